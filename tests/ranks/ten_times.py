"""The matrix many times in a row, each time with another seed: ``python tests/ranks/ten_times.py``. Nothing may flake.

A flake is a row whose outcome differs from that of the first run, a row that comes and goes, or a run that fails. What
is known to fail, and fails each time, is none.
"""

# ruff: noqa: T201 - a script's output is what it prints

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.matrix_runs import run_matrix  # noqa: E402 - found by the line above

#: (model, test, variant, layout, backend) -> outcome.
Rows = dict[tuple[str, ...], str]
_KEY = ("model_type", "test", "variant", "layout", "backend")


def rows_of(results: Sequence[dict[str, Any]]) -> Rows:
    """Return the outcomes of a report's rows."""
    return {tuple(str(row.get(name, "")) for name in _KEY): row["outcome"] for row in results}


def differences(first: Rows, other: Rows) -> list[str]:
    """Return what differs between two runs, one line each."""
    keys = sorted(first.keys() | other.keys())
    return [
        f"{'/'.join(key)}: {first.get(key, 'no row')} -> {other.get(key, 'no row')}"
        for key in keys
        if first.get(key) != other.get(key)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return 1 where anything flaked or failed."""
    parser = argparse.ArgumentParser(description="the matrix many times in a row, each time with another seed")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--models", default="headline")
    parser.add_argument("--folder", type=Path, default=ROOT / "reports" / "ten-times")
    parser.add_argument("pytest_arguments", nargs="*", help="after --")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs={options.runs} must be at least 1")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    first: Rows = {}
    problems = []
    for seed in range(options.first_seed, options.first_seed + options.runs):
        run = run_matrix(
            folder / f"seed-{seed}.json",
            models=options.models,
            seed=seed,
            workers=options.workers,
            more=options.pytest_arguments,
        )
        rows = rows_of(run.results)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(rows.values()).items()))
        print(f"seed {seed}: {counts or 'no rows'}; exit status {run.status}; {run.seconds:.0f} s", flush=True)
        first = first or rows
        found = differences(first, rows)
        if run.status or not rows:
            found.append(f"exit status {run.status}, {len(rows)} rows: see {run.log}")
        for line in found:
            print(f"  {line}")
        problems += found
    print(f"{options.runs} runs: {len(problems)} flakes and failures")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
