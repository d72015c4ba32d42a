"""The page `docs/museum.md`, generated from the entries: ``python -m fsdp_testkit.faults.museum_page``."""

from __future__ import annotations

from pathlib import Path

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.bugs import FAMILIES
from fsdp_testkit.faults.museum import CAUSES, Entry, entries

INTRODUCTION = """\
# The museum

Publicly reported bugs of sharded training, re-created as small faults. Each one is armed on real ranks, and
the kit has to go red for the right reason: one of the named checks has a finding, the named rank is blamed, the
fault counted its hits, and without the fault the same test is green. `pytest tests/museum` runs a sample with
every cause, `pytest tests/museum -m museum` runs all, and `python -m fsdp_testkit museum --run` prints the score
of a run: by which check each one was caught, with which diagnosis, on which ranks. `--id` and `--family` choose.
How to write a fault of your own: [writing-a-fault.md](writing-a-fault.md).

This page is generated: `python -m fsdp_testkit.faults.museum_page`.
"""


def page() -> str:
    """Return `docs/museum.md`."""
    listed = entries()
    real = [entry for entry in listed if entry.fault is not None]
    lines = [INTRODUCTION, f"**{len(real)} of {len(listed)}** are re-created.", ""]
    lines += table(
        "bug | families | story | test | caught by | rank blamed | diagnosis",
        [real_row(entry, entry.fault) for entry in real if entry.fault is not None],
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


def real_row(entry: Entry, fault: type[Fault]) -> list[str]:
    """Return the cells of a bug that is re-created."""
    return [
        link(entry),
        families(entry),
        fault.story,
        f"{fault.test} ({fault.variant}, {fault.model})",
        ", ".join(fault.checks),
        "" if fault.blamed is None else str(fault.blamed),
        "; ".join(fault.causes),
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
    Path("docs/museum.md").write_text(page(), encoding="utf-8")
