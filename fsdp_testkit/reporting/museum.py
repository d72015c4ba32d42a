"""The score table of the museum: how each bug was caught."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HEAD = ("bug", "family", "caught by", "diagnosis", "ranks", "seconds")


def score_lines(faults: Sequence[Mapping[str, Any]], *, ran: bool) -> list[str]:
    """Return the lines of the table.

    Args:
        faults: the objects of the score's JSON, see `fsdp_testkit.faults.score.Score`.
        ran: whether they were run; without it the table says what is expected of each bug.
    """
    rows = [_HEAD if ran else ("bug", "family", "real", "diagnosis"), *(_row(fault, ran) for fault in faults)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(_reasons(faults)), "", _total(faults, ran)]


def score_line(fault: Mapping[str, Any]) -> str:
    """Return one line on a bug that was just run."""
    caught = f"caught by {', '.join(fault['caught_by'])}" if fault["caught"] else "NOT CAUGHT"
    return f"{fault['id']}: {caught}; {diagnosis(fault)}; {fault['seconds']:.1f} s"


def _row(fault: Mapping[str, Any], ran: bool) -> tuple[str, ...]:
    family = fault["families"][0]
    if not ran:
        return fault["id"], family, "yes" if fault["real"] else "no", "; ".join(fault["expected"])
    if not fault["real"]:
        return fault["id"], family, "(not real)", "", "", ""
    caught = ", ".join(fault["caught_by"]) if fault["caught"] else "NOT CAUGHT"
    ranks = ", ".join(str(rank) for rank in fault["ranks"]) or "all"
    return fault["id"], family, caught, diagnosis(fault), ranks, f"{fault['seconds']:.1f}"


def diagnosis(fault: Mapping[str, Any]) -> str:
    """Return the cause that was named, and the right one where it is another."""
    if fault["diagnosis_right"]:
        return str(fault["diagnosis"])
    return f"{fault['diagnosis'] or 'none'} (right: {fault['expected'][0]})"


def _reasons(faults: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for fault in faults:
        text = fault["missing"] or ((fault["reason"],) if fault["reason"] else ())
        if text:
            yield ""
            yield f"{fault['id']}: {'not caught' if fault['real'] else 'not re-created'}"
            yield from (f"  {line}" for part in text for line in str(part).splitlines())


def _total(faults: Sequence[Mapping[str, Any]], ran: bool) -> str:
    real = [fault for fault in faults if fault["real"]]
    if not ran:
        return f"{len(faults)} bugs, {len(real)} real"
    caught = sum(fault["caught"] for fault in real)
    right = sum(bool(fault["diagnosis_right"]) for fault in real)
    spent = sum(fault["seconds"] for fault in real)
    return f"{len(faults)} bugs, {len(real)} real: {caught} caught, {right} diagnosed rightly; {spent:.0f} s of runs"
