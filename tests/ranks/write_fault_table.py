"""Write the fault table of ``docs/harness.md`` from a real run: ``python tests/ranks/write_fault_table.py``."""

# ruff: noqa: T201 - a script's output is what it prints

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from faults import DEADLINE, FAULTS, strike  # noqa: E402 - found by the line above

from fsdp_testkit.ranks import Harness, cores  # noqa: E402

PAGE = HERE.parent.parent / "docs" / "harness.md"
BEGIN, END = "<!-- fault table: written by tests/ranks/write_fault_table.py -->", "<!-- end of the fault table -->"


def main() -> int:
    """Strike every fault on two and four ranks, on the first and the last of them; return the number of surprises."""
    rows = [
        "| fault | what the user sees | seconds until reported | next test unaffected |",
        "|---|---|---|---|",
    ]
    surprises = 0
    with Harness(preload=("numpy", "torch.distributed"), grace=1.0) as harness:
        for fault in FAULTS:
            places = [(size, rank) for size in (2, 4) for rank in (0, size - 1)]
            every = [strike(harness, fault, *place) for place in places]
            wrong = [f"{place}: {seen.problem}" for place, seen in zip(places, every, strict=True) if seen.problem]
            surprises += len(wrong)
            said = re.sub(r"\s+", " ", every[1].said).replace("|", "\\|")
            said = said if len(said) <= 150 else f"{said[:150]}..."
            slowest = max(seen.seconds for seen in every)
            after = max(seen.next_seconds for seen in every)
            limit = f" (deadline {DEADLINE:g})" if "hang" in fault.kind else ""
            good = f"yes, after {after:.1f} s" if not wrong else f"NO: {'; '.join(wrong)}"
            rows.append(f"| {fault.title} | {said} | {slowest:.1f}{limit} | {good} |")
            print(rows[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    note = f"Slowest of four runs (2 and 4 ranks, struck on the first and on the last), {cores()} cores."
    PAGE.write_text(f"{head}{BEGIN}\n{note}\n\n" + "\n".join(rows) + f"\n{END}{tail}", encoding="utf-8")
    print(f"{PAGE}: {len(FAULTS)} faults, {surprises} surprises")
    return surprises


if __name__ == "__main__":
    sys.exit(min(1, main()))
