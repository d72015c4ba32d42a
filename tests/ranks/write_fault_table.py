"""Write the fault tables of ``docs/harness.md`` from a real run: ``python tests/ranks/write_fault_table.py``."""

# ruff: noqa: T201 - a script's output is what it prints

from __future__ import annotations

import re
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from faults import FAULTS, strike  # noqa: E402 - found by the line above
from test_parent_faults import run  # noqa: E402

from fsdp_testkit.ranks import Harness, Job, cores  # noqa: E402

#: By which the limits are multiplied: ``python tests/ranks/write_fault_table.py 4`` on a machine that others use.
PATIENCE = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
PAGE = HERE.parent.parent / "docs" / "harness.md"
BEGIN, END = "<!-- fault table: written by tests/ranks/write_fault_table.py -->", "<!-- end of the fault table -->"


def main() -> int:
    """Strike every fault on two and four ranks: the first, the last, all of them; return the number of surprises."""
    rows = [
        "| fault | what the user sees | seconds until reported | next test unaffected |",
        "|---|---|---|---|",
    ]
    surprises = 0
    with Harness(preload=("numpy", "torch.distributed"), grace=1.0) as harness:
        harness.run(Job(target="targets:good", world_size=2)).discard()  # the start of the server is nobody's fault
        for fault in FAULTS:
            places = fault.places(2, 4)
            every = [strike(harness, fault, *place, patience=PATIENCE) for place in places]
            if every[0].lacks:
                rows.append(f"| {fault.title} | not tried: {every[0].lacks} | | |")
                continue
            wrong = [f"{place}: {seen.problem}" for place, seen in zip(places, every, strict=True) if seen.problem]
            surprises += len(wrong)
            said = re.sub(r"\s+", " ", every[1].said).replace("|", "\\|")
            said = said if len(said) <= 150 else f"{said[:150]}..."
            slowest = max(seen.seconds for seen in every)
            after = max(seen.next_seconds for seen in every)
            limit = f" ({fault.limit})" if fault.limit else ""
            good = f"yes, after {after:.1f} s" if not wrong else f"NO: {'; '.join(wrong)}"
            rows.append(f"| {fault.title} | {said} | {slowest:.1f}{limit} | {good} |")
            print(rows[-1], flush=True)
    rows += ["", *_parents()]
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    note = (
        "Slowest of all runs: 2 and 4 ranks, struck on the first and the last, and on all of them where that makes\n"
        f"sense; {cores()} cores."
    )
    PAGE.write_text(f"{head}{BEGIN}\n{note}\n\n" + "\n".join(rows) + f"\n{END}{tail}", encoding="utf-8")
    print(f"{PAGE}: {len(FAULTS)} faults, {surprises} surprises")
    return surprises


def _parents() -> list[str]:
    """Strike the parent in the middle of a job."""
    rows = ["| what ends in the middle of a job | what is left of it | seconds until nothing is |", "|---|---|---|"]
    for title, number, arguments, left in (
        ("Ctrl-C in the session (SIGINT)", signal.SIGINT, [], "no process, no file"),
        ("SIGTERM of the session", signal.SIGTERM, [], "no process, no file"),
        ("SIGKILL of the session", signal.SIGKILL, [], "no process, no file"),
        ("SIGKILL of a worker of pytest-xdist", signal.SIGKILL, ["-n", "1"], "its test fails, the others pass"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            _, _, seconds = run(Path(folder), number, *arguments)
        rows.append(f"| {title} | {left} | {seconds:.1f} |")
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(min(1, main()))
