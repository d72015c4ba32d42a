"""What a user reads when a test fails: from result rows to text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from fsdp_testkit.core.case import replay_command as command_for
from fsdp_testkit.core.result import BAD_OUTCOMES, Result

#: Findings shown over all rows of one item; the report has them all.
SHOWN = 8
#: Longest expected or actual value that is printed whole.
_WIDTH = 160
#: Further causes that are named.
_CAUSES = 3
_DISTANCES = ("max_abs_error", "max_rel_error")
#: Lines of a rank's report that are printed whole.
_LINES = 60


def failure_text(rows: Sequence[Result], *, shown: int = SHOWN) -> str:
    """Return the message for the bad rows among ``rows``: what, where, how far off, how to replay."""
    bad = [row for row in rows if row.outcome in BAD_OUTCOMES]
    # every bad row shows at least one finding, however many the first one has
    share = max(1, shown // max(1, len(bad)))
    blocks = [headline(bad)] if len(bad) > 1 else []
    blocks.extend(_row(row, share) for row in bad)
    return "\n\n".join(blocks)


def headline(rows: Sequence[Result]) -> str:
    """Return one line that names the model, the test and where it went wrong; pytest's summary shows it."""
    first = rows[0]
    layouts = ", ".join(dict.fromkeys(row.layout for row in rows if row.layout not in ("", "none")))
    where = f" on {layouts}" if layouts else ""
    count = sum(_total(row) for row in rows)
    findings = f" ({count} finding{'s' if count != 1 else ''})" if count else ""
    return f"{title(first)} {_verb(rows)}{where} with backend {first.backend}{findings}"


def title(row: Result) -> str:
    """Return the model, test and variant: ``llama: hsdp_vs_ddp (tied)``."""
    variant = "" if row.variant == "default" else f" ({row.variant})"
    return f"{row.model_type}: {row.test}{variant}"


def replay_command(row: Result) -> str:
    """Return the shell command that runs the row's case again, or ``""`` where the row holds no case."""
    if case := row.extra.get("case"):
        text = case if isinstance(case, str) else json.dumps(case, sort_keys=True, separators=(",", ":"))
        return command_for(text)
    return next((str(finding["replay"]) for finding in row.findings if finding.get("replay")), "")


def finding_lines(finding: dict[str, Any], hosts: Sequence[str] = ()) -> list[str]:
    """Return a finding as lines: the sentence first, then where, the values, the distance, the judge.

    ``hosts`` has the name of each rank's host, where there are several.
    """
    lines = [f"{finding.get('check', '?')}: {finding.get('message', '(no message)')}"]
    ranks = [
        f"{rank} (host {hosts[rank]})" if rank < len(hosts) else str(rank)
        for rank in finding.get("ranks", [finding.get("rank")])
        if rank is not None
    ]
    where = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"] if ranks else []
    where.extend(
        f"{label}{finding[name]}"
        for name, label in (("step", "step "), ("parameter", ""))
        if finding.get(name) not in (None, "")
    )
    if where:
        lines.append("  where     " + ", ".join(where))
    for name in ("expected", "actual"):
        if finding.get(name) not in (None, ""):
            lines.append(f"  {name:<9} {_clip(str(finding[name]))}")
    if (distance := _distance(finding)) != "":
        lines.append(f"  error     {distance}")
    judge = f"  judged by {finding.get('judged_by', 'rules')}"
    nature = {
        "logic": "logic: it is still there in float64",
        "rounding": "rounding: it shrinks away in float64",
        "undecided": "undecided: the model does not run in float64, and rounding moves truth's own numbers less",
    }.get(str(finding.get("nature", "")), str(finding.get("nature", "")))
    lines.append(f"{judge}; {nature}" if nature else judge)
    return lines


def diagnosis_lines(causes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the likely cause as lines: what was seen, what to look at, who met it; then the next ones, by name."""
    if not causes:
        return []
    first, *others = causes
    lines = [f"likely cause: {first['cause']}: {_clip(first['text'], 2 * _WIDTH)}", f"  look at   {first['advice']}"]
    lines.extend(f"  alike     {thread}" for thread in first["threads"])
    if others:
        lines.append(f"  or else   {', '.join(str(other['cause']) for other in others[:_CAUSES])}")
    return lines


def fold_ranks(findings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return findings with those that only the rank tells apart as one, which has them under ``ranks``."""
    folded: dict[str, dict[str, Any]] = {}
    for finding in findings:
        same = {name: value for name, value in finding.items() if name not in ("rank", "detail", *_DISTANCES)}
        kept = folded.setdefault(json.dumps(same, sort_keys=True, default=str), {**finding, "ranks": []})
        kept["ranks"].append(finding.get("rank"))
        for name in _DISTANCES:
            if (value := finding.get(name)) is not None:
                # the worst of the ranks; not-a-number is worse than any number
                old = kept.get(name)
                kept[name] = value if old is None or not value <= old else old
    return list(folded.values())


def _row(row: Result, shown: int) -> str:
    lines = [headline([row])]
    said = {str(finding.get("message", "")) for finding in row.findings}
    if row.reason and row.reason not in said:
        lines.extend(f"  {line}" for line in row.reason.splitlines())
    lines.extend(f"  {line}" for line in diagnosis_lines(row.extra.get("diagnosis", [])))
    folded = fold_ranks(row.findings)
    for number, finding in enumerate(folded[:shown], start=1):
        first, *rest = finding_lines(finding, row.extra.get("hosts", ()))
        lines.append("")
        lines.append(f"  {number}. {first}")
        lines.extend(f"   {line}" for line in rest)
    rest_of = folded[shown:]
    # a row may hold only the first of very many findings
    beyond = _total(row) - len(row.findings)
    if more := sum(len(finding["ranks"]) for finding in rest_of) + beyond:
        kinds = f": {_others(rest_of)}" if rest_of else ""
        lines.append("")
        lines.append(f"  and {more} more{kinds} (--fsdp-report FILE.json holds up to 40 of each check)")
    for name in ("report", "traceback"):
        if text := str(row.extra.get(name) or "").strip():
            lines.append("")
            lines.extend(f"  {line}" for line in _middle_out(text.splitlines()))
    if command := replay_command(row):
        lines.append("")
        lines.append("  replay exactly this case:")
        lines.append(f"    {command}")
    return "\n".join(lines)


def _total(row: Result) -> int:
    """Return how many findings there were: a row may hold only the first of very many."""
    return max(len(row.findings), int(row.extra.get("findings_total", 0)))


def _middle_out(lines: list[str]) -> list[str]:
    """Return long text without its middle: causes stand at the top, the last call at the bottom."""
    if len(lines) <= _LINES:
        return lines
    half = _LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]


def _others(findings: Iterable[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for finding in findings:
        name = str(finding.get("check", "?"))
        counts[name] = counts.get(name, 0) + len(finding["ranks"])
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _distance(finding: dict[str, Any]) -> str:
    parts = []
    if finding.get("max_abs_error") is not None:
        parts.append(f"{number(finding['max_abs_error'])} absolute")
    if finding.get("max_rel_error") is not None:
        parts.append(f"{number(finding['max_rel_error'])} relative")
    if finding.get("tolerance") is not None:
        parts.append(f"tolerance {number(finding['tolerance'])} relative")
    return ", ".join(parts)


def number(value: Any) -> str:
    """Return a number short enough to read: ``1.3e-07``; text (``nan`` in a report) comes back as it is."""
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _verb(rows: Sequence[Result]) -> str:
    outcomes = {row.outcome for row in rows}
    if outcomes == {"xpassed"}:
        return "passed unexpectedly"
    return "could not be run" if outcomes == {"error"} else "failed"


def _clip(text: str, width: int = _WIDTH) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 3]}..."
