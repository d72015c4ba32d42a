"""A second look at a red run, for the diagnosis: what it costs, only red rows pay."""

from __future__ import annotations

import copy
import traceback

from fsdp_testkit.checks.buffers import check_buffers, check_dtypes
from fsdp_testkit.checks.parts import explain_gradients, first_bad_step
from fsdp_testkit.checks.structure import check_structure, check_ties
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Finding
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.diagnosis.seen import of_run
from fsdp_testkit.engine.outcome import Outcome
from fsdp_testkit.engine.work import SpecWork, truth_case


def look_closer(outcome: Outcome, work: SpecWork, case: Case, run: list[Evidence], truth: Evidence) -> None:
    """Where a run is red, look at what its own test does not judge, and at what wrong gradients are made of.

    What goes wrong here must not cost the findings: it is noted as ``diagnosis_error``.
    """
    if not outcome.verdict.findings:
        return
    try:
        _look(outcome, work, case, run, truth)
    except Exception:
        outcome.extra["diagnosis_error"] = traceback.format_exc()


def _look(outcome: Outcome, work: SpecWork, case: Case, run: list[Evidence], truth: Evidence) -> None:
    findings = outcome.verdict.findings
    outcome.hints = hints(run, truth, case)
    step = first_bad_step(findings)
    parts = None if step is None else parts_of(work, case, step)
    if parts is not None and step is not None:
        outcome.verdict.findings = explain_gradients(findings, run, truth, parts, case, step)
    outcome.run_facts = of_run(case, run, truth, parts, step)


def hints(run: list[Evidence], truth: Evidence, case: Case) -> list[Finding]:
    """Return findings of other checks over the same evidence; they are no verdict of the row."""
    tree = copy.deepcopy(truth.facts["tree"])
    for name, facts in truth.facts["parameters"].items():
        tree["parameters"][name]["requires_grad"] = facts["requires_grad"]  # the case may freeze some
    if not all("units" in evidence.facts for evidence in run):  # then buffers were read late, too
        return check_ties(run, tree).findings
    found = check_structure(run, tree, case.layout).add(check_buffers(run, truth)).add(check_dtypes(run, truth))
    return found.findings


def parts_of(work: SpecWork, case: Case, step: int) -> Evidence | None:
    """Return each rank's and micro-batch's own gradients of ``step``, ``None`` where they cannot be had."""
    run = work.job(
        "parts:run",
        {"case": truth_case(case).to_json(), "step": step},
        Layout(kind="single"),
        name=f"parts of a gradient of {work.spec.model_type}",
    )
    return None if run.failure else run.get()[0]
