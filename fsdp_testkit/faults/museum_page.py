"""The page `docs/museum.md`, made of the entries and the score of a run of them all.

``python -m fsdp_testkit.faults.museum_page`` writes it from ``docs/museum.json``, which is what
``python -m fsdp_testkit museum --run --json docs/museum.json`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.bugs import FAMILIES
from fsdp_testkit.faults.museum import CAUSES, Entry, entries
from fsdp_testkit.faults.score import SCHEMA

INTRODUCTION = """\
# The museum

Publicly reported bugs of sharded training, re-created as small faults. Each one is armed on real ranks, and
the kit has to go red for the right reason: one of the named checks has a finding, the named rank is blamed, the
fault counted its hits, and without the fault the same test is green. `pytest tests/museum` runs a sample with
every cause, `pytest tests/museum -m museum` runs all, and `python -m fsdp_testkit museum --run` prints the score
of a run: by which check each one was caught, with which diagnosis, on which ranks. `--id` and `--family` choose.
How to write a fault of your own: [writing-a-fault.md](writing-a-fault.md).

This page is generated from the score of a run of them all, `docs/museum.json`: `make museum` runs them and writes both.
*Caught by* are the checks that had a finding, *ranks* those that the findings name, *diagnosis* is the cause that the
kit named first (and the right one, where that is another), and *seconds* those of the runs with the fault.
"""


def read_score(file: Path) -> dict[str, Any]:
    """Read the JSON of a score.

    Raises:
        UsageError: the file is missing, is no score, or not of all bugs.
    """
    try:
        score = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(score, dict) or score.get("schema") != SCHEMA:
        schema = score.get("schema") if isinstance(score, dict) else None
        raise UsageError(f"{file} is no score of the museum: its schema is {schema!r}, and must be {SCHEMA!r}")
    known = {fault["id"] for fault in score["faults"]}
    if lost := [entry.bug for entry in entries() if entry.bug not in known]:
        raise UsageError(f"{file} is the score of {len(known)} bugs, and lacks {', '.join(lost[:5])}")
    return score


def page(score: Mapping[str, Any]) -> str:
    """Return `docs/museum.md`, for what `read_score` gave."""
    listed = entries()
    found = {fault["id"]: fault for fault in score["faults"]}
    real = [entry for entry in listed if entry.fault is not None]
    caught = sum(found[entry.bug]["caught"] for entry in real)
    right = sum(bool(found[entry.bug]["diagnosis_right"]) for entry in real)
    seconds = sum(found[entry.bug]["seconds"] for entry in real)
    fared = f"{caught} are caught, {right} with the right diagnosis first, in {seconds:.0f} s of runs"
    lines = [INTRODUCTION, f"**{len(real)} of {len(listed)}** are re-created; {fared}.", ""]
    lines += table(
        "bug | families | story | test | caught by | ranks | diagnosis | seconds",
        [real_row(entry, entry.fault, found[entry.bug]) for entry in real if entry.fault is not None],
    )
    if missing := [entry for entry in listed if entry.fault is None]:
        lines += ["", "## Not re-created", ""]
        lines += table("bug | families | reason", [[link(entry), families(entry), entry.reason] for entry in missing])
    lines += ["", "## Causes", "", "The list is closed; each cause is defined by the evidence that shows it.", ""]
    causes = [entry.fault.causes[0] for entry in real if entry.fault is not None]
    lines += table(
        "cause | evidence | bugs", [[cause, text, str(causes.count(cause))] for cause, text in CAUSES.items()]
    )
    return "\n".join(lines) + "\n"


def real_row(entry: Entry, fault: type[Fault], score: Mapping[str, Any]) -> list[str]:
    """Return the cells of a bug that is re-created, and of how it fared."""
    named = score["diagnosis"] or "none"
    return [
        link(entry),
        families(entry),
        fault.story,
        f"{fault.test} ({fault.variant}, {fault.model})",
        ", ".join(score["caught_by"]) if score["caught"] else "not caught",
        ", ".join(str(rank) for rank in score["ranks"]) or "all",
        named if score["diagnosis_right"] else f"{named} (right: {fault.causes[0]})",
        f"{score['seconds']:.1f}",
    ]


def link(entry: Entry) -> str:
    """Return the bug's id, linked to its thread."""
    return f"[{entry.bug}]({entry.thread})"


def families(entry: Entry) -> str:
    """Return the names of a bug's families."""
    return ", ".join(FAMILIES[number] for number in entry.families)


def table(head: str, rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose columns ``head`` names, divided by bars."""
    columns = head.count("|") + 1
    return [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    Path("docs/museum.md").write_text(page(read_score(Path("docs/museum.json"))), encoding="utf-8")
