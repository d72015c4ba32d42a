"""What a procedure found for one layout, and how it becomes a result row."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fsdp_testkit.core.case import Case, ModelSpec, replay_command
from fsdp_testkit.core.finding import Finding, Verdict
from fsdp_testkit.core.result import Result
from fsdp_testkit.diagnosis import RunFacts, diagnose, of_case
from fsdp_testkit.engine.work import Run

#: Findings near a cause come first; what follows from them (losses, weights at the end) comes last.
_ORDER = (
    "fault_hits",
    "ranks",
    "batches",
    "routing",
    "clipping",
    "ties",
    "structure",
    "reshard",
    "dtypes",
    "buffers",
    "initial_weights",
    "meta_init",
    "optimizer_binding",
    "files",
    "reload",
    "restored_optimizer",
    "replicas",
    "movement",
)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a procedure found for one layout.

    ``hints`` (findings of checks that do not judge this row) and ``run_facts`` are for the diagnosis of red rows.
    """

    layout: str = ""
    verdict: Verdict = field(default_factory=Verdict.empty)
    case: Case | None = None
    outcome: str = ""
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    hints: list[Finding] = field(default_factory=list)
    run_facts: RunFacts | None = None

    @classmethod
    def not_applicable(cls, reason: str) -> Outcome:
        """Return an outcome for what the backend or the model cannot express."""
        return cls(outcome="not_applicable", reason=reason)

    @classmethod
    def error(cls, text: str) -> Outcome:
        """Return an outcome for a failure outside the implementation under test."""
        lines = [line for line in text.strip().splitlines() if line.strip()]
        return cls(outcome="error", reason=lines[0] if lines else "error", extra={"report": text})

    def to_result(self, spec: ModelSpec, test: str, variant: str, backend: str, seconds: float) -> Result:
        """Return the row."""
        findings = sorted(self.verdict.findings, key=urgency)
        causes = self.diagnosis()
        replay = replay_command(self.case.to_json()) if self.case is not None else ""
        compared = self.verdict.tensors > 0
        return Result(
            model_type=spec.model_type,
            test=test,
            variant=variant,
            layout=self.layout,
            backend=backend,
            outcome=self.outcome or ("failed" if findings else "passed"),
            reason=self.reason or (findings[0].message if findings else ""),
            seconds=round(seconds, 4),
            max_abs_error=self.verdict.max_abs_error if compared else None,
            max_rel_error=self.verdict.max_rel_error if compared else None,
            tolerance=self.verdict.tolerance if compared else None,
            checks=self.verdict.checks,
            tensors=self.verdict.tensors,
            findings=[finding.to_dict() | {"replay": replay} for finding in at_most(findings, per_check=40)],
            extra=self.extra
            | ({"case": json.loads(self.case.to_json())} if self.case is not None else {})
            | ({"findings_total": len(findings), "diagnosis": causes} if findings else {}),
        )

    def diagnosis(self) -> list[dict[str, Any]]:
        """Return the causes that fit what was found, nearest first.

        A rule that breaks must not cost the findings: it is noted as ``diagnosis_error``.
        """
        if not self.verdict.findings:
            return []
        run = self.run_facts or of_case(self.case)
        report = str(self.extra.get("report", ""))
        try:
            causes = diagnose(self.verdict.findings, run, hints=self.hints, report=report)
            return [cause.to_dict() for cause in causes]
        except Exception:
            self.extra["diagnosis_error"] = traceback.format_exc()
            return []


def judged(case: Case, run: Run, check: Callable[[], Verdict]) -> Outcome:
    """Return the verdict over a run; a job that failed is a finding of its own."""
    outcome = Outcome(layout=str(case.layout), case=case)
    if run.notes:
        outcome.extra["notes"] = run.notes
    if run.hosts:
        outcome.extra["hosts"] = run.hosts
    if run.failure:
        outcome.verdict.expect(
            False, Finding(check="ranks", message=run.failure, rank=run.first_rank, judged_by="harness")
        )
        outcome.extra["report"] = run.report
        return outcome
    outcome.verdict = check()
    return outcome


def urgency(finding: Finding) -> tuple[int, int]:
    """Sort key: near the cause first, then by step."""
    place = _ORDER.index(finding.check) if finding.check in _ORDER else len(_ORDER)
    return place, finding.step if finding.step is not None else -1


def at_most(findings: list[Finding], *, per_check: int) -> list[Finding]:
    """Return the first findings of each check."""
    counts: dict[str, int] = {}
    kept = []
    for finding in findings:
        counts[finding.check] = counts.get(finding.check, 0) + 1
        if counts[finding.check] <= per_check:
            kept.append(finding)
    return kept
