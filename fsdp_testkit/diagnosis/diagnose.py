"""From the findings of a red row to causes, nearest first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsdp_testkit.core.finding import Finding
from fsdp_testkit.diagnosis.causes import CAUSES
from fsdp_testkit.diagnosis.names import ranks_text, short
from fsdp_testkit.diagnosis.rule import Rule
from fsdp_testkit.diagnosis.rules import RULES
from fsdp_testkit.diagnosis.seen import RunFacts
from fsdp_testkit.diagnosis.view import MARKS, SIGNS, View, factor

#: Causes and threads that are shown.
SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One cause that fits.

    Attributes:
        cause: a key of `CAUSES`.
        place: of the rule that speaks for it: the smaller, the nearer to the cause.
        text: what was seen, in one or two sentences.
        advice: what to look at first.
        findings: how many findings speak for it.
        ranks: where.
        threads: public reports of bugs that look alike.
    """

    cause: str
    place: int
    text: str
    advice: str
    findings: int
    ranks: tuple[int, ...]
    threads: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"ranks": list(self.ranks), "threads": list(self.threads)}


def diagnose(
    findings: Iterable[Finding], run: RunFacts | None = None, *, hints: Iterable[Finding] = (), report: str = ""
) -> list[Diagnosis]:
    """Return the causes that fit, nearest first; empty where no rule does.

    Args:
        findings: what the checks of a row found.
        run: facts of its run, where there are any.
        hints: what other checks found over the same evidence.
        report: the account of a job that failed.
    """
    # what the kit itself got wrong says nothing of the run
    judged = [finding for finding in (*findings, *hints) if finding.judged_by != "kit"]
    view = View(tuple(judged), run or RunFacts(), report)
    found: dict[str, Diagnosis] = {}
    for rule in sorted(RULES, key=lambda rule: rule.place):
        if rule.cause not in found and (picked := pick(rule, view)):
            found[rule.cause] = _diagnosis(rule, picked, view)
    return list(found.values())


def pick(rule: Rule, view: View) -> list[Finding]:
    """Return the findings that speak for the rule's cause; empty where it does not fit."""
    picked = [finding for finding in view.of(*rule.checks) if _speaks(rule, finding, view)]
    holds = bool(picked) and all(SIGNS[name].holds(picked, view) for name in rule.signs)
    return picked if holds and not any(SIGNS[name].holds(picked, view) for name in rule.unless) else []


def nearest(rows: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Any] | None:
    """Return the nearest diagnosis of several rows of one test (each a list of `Diagnosis.to_dict`)."""
    return min((row[0] for row in rows if row), key=lambda item: int(item["place"]), default=None)


@lru_cache(maxsize=1)
def threads() -> dict[str, tuple[str, ...]]:
    """Return cause -> public reports of bugs of that kind."""
    table = json.loads(Path(__file__).with_name("threads.json").read_text(encoding="utf-8"))
    return {cause: tuple(urls) for cause, urls in table.items()}


def _speaks(rule: Rule, finding: Finding, view: View) -> bool:
    if rule.at_first and (finding.judged_by != "truth" or finding.step != view.run.first_bad):
        return False
    text = f"{finding.message}\n{_errors(view.report)}" if finding.check == "ranks" else finding.message
    if rule.words and not re.search(rule.words, text):
        return False
    return all(MARKS[name].holds(finding, view) for name in rule.marks) and not any(
        MARKS[name].holds(finding, view) for name in rule.without
    )


def _errors(report: str) -> str:
    """Return the texts of errors in an account; the frames of stacks, which lie deeper, are no evidence of a cause."""
    return "\n".join(line for line in report.splitlines() if re.match(r"  (\S|tensor at)", line))


def _message(picked: list[Finding]) -> str:
    """Return the first finding's sentence, said of all that were picked for the same."""
    first, whole = _about(picked[0]), _whole(picked[0].parameter)
    if first is None:
        return picked[0].message
    return whole.sub(lambda _: short(f.parameter for f in picked if _about(f) == first), picked[0].message, count=1)


def _about(finding: Finding) -> str | None:
    """Return what a finding says of its parameter, ``None`` where it does not name it."""
    if not finding.parameter:
        return None
    text, count = _whole(finding.parameter).subn("", finding.message)
    return re.sub(r"\d+", "", text) if count else None


def _whole(name: str) -> re.Pattern[str]:
    """Return a pattern that finds a name, and not a longer one that holds it."""
    return re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")


def _diagnosis(rule: Rule, picked: list[Finding], view: View) -> Diagnosis:
    return Diagnosis(
        cause=rule.cause,
        place=rule.place,
        text=rule.says.format_map(fields(picked, view)),
        advice=CAUSES[rule.cause].advice,
        findings=len(picked),
        ranks=tuple(sorted({finding.rank for finding in picked if finding.rank is not None})),
        threads=threads().get(rule.cause, ())[:SHOWN],
    )


def fields(picked: list[Finding], view: View) -> dict[str, str]:
    """Return what the sentence of a rule can name: the numbers of the first finding, the places of all of them."""
    first = picked[0]
    detail = first.detail
    names = short(finding.parameter for finding in picked)
    found = factor(first)
    worst = max((finding.max_rel_error or 0.0 for finding in picked), default=0.0)
    rows = detail.get("rows", [])
    steps = [finding.step for finding in picked if finding.step is not None]
    return {
        "names": names or first.check.replace("_", " "),
        "ranks": ranks_text((finding.rank for finding in picked if finding.rank is not None), view.run.world) or "all",
        "step": str(min(steps, default=0)),
        "message": _message(picked),
        "failure": _cut(first.message, 300),
        "expected": _cut(first.expected, 60),
        "actual": _cut(first.actual, 60),
        "error": f"{worst:.2g}",
        "factor": "" if found is None else f"{found:.4g}",
        "parts": "[" + ", ".join(f"{part:.3g}" for part in detail.get("parts", [])) + "]",
        "parts_rest": f"{detail.get('parts_rest', 0.0):.2g}",
        "other": str(detail.get("is_other", "")),
        "rows": f"{rows[0]} to {rows[1]}" if rows else "",
        "of": str(detail.get("of", "")),
        "wrong": f"{detail.get('wrong', 0.0):.0%}",
        "holds": _holds(detail),
    }


def _holds(detail: dict[str, Any]) -> str:
    if detail.get("nonfinite"):
        return "hold NaN or infinity"
    return f"hold {detail['fill']:g} everywhere" if "fill" in detail else "hold huge values"


def _cut(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 3]}..."
