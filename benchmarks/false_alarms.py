"""Runs that have to stay green: the matrix with several seeds, the extended tier on the headline models.

python -m benchmarks.false_alarms [--seeds 10] [--models all] [--extended headline] [--workers 4] [--folder reports]

The reference backend, nothing armed. Prints one line a run: rows, failures, what fp64 found to be rounding only, the
largest relative error that passed beside its tolerance, seconds. Exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.matrix_runs import run_matrix
from fsdp_testkit.core.result import BAD_OUTCOMES

HEAD = ("tier", "models", "seed", "rows", "passed", "failed", "rounding", "largest error", "tolerance", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the matrix."""

    tier: str
    models: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its report."""
        return f"false-alarms-{self.tier}-{self.seed}.json"


def planned(seeds: int, models: str, extended: str) -> list[Run]:
    """Return the runs: the core tier with each seed, the extended tier with the first one."""
    runs = [Run(tier="core", models=models, seed=seed) for seed in range(seeds) if models]
    return runs + ([Run(tier="extended", models=extended, seed=0)] if extended else [])


def row(run: Run, results: Sequence[dict[str, Any]], seconds: float) -> tuple[str, ...]:
    """Return the cells of a run's line."""
    outcomes = [result["outcome"] for result in results]
    errors = [
        (result["max_rel_error"], result["tolerance"])
        for result in results
        if result["max_rel_error"] is not None and result["outcome"] == "passed"
    ]
    # relative to the tolerance that it had to keep
    error, bound = max(errors, key=lambda pair: pair[0] / (pair[1] or 1.0), default=(0.0, 0.0))
    return (
        *(run.tier, run.models, str(run.seed), str(len(results)), str(outcomes.count("passed"))),
        str(sum(outcome in BAD_OUTCOMES for outcome in outcomes)),
        str(sum(bool(result["extra"].get("rounding")) for result in results)),
        *(f"{error:.2g}", f"{bound:.2g}", f"{seconds:.0f}"),
    )


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each row that failed."""
    return [
        f"{result['model_type']} {result['test']} ({result['variant']}) on {result['layout']}: {result['reason']}"
        for result in results
        if result["outcome"] in BAD_OUTCOMES
    ]


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="runs of the core tier (10)")
    parser.add_argument("--models", default="all", help="of the core tier (all); '' for none")
    parser.add_argument("--extended", default="headline", metavar="MODELS", help="of the extended tier (headline)")
    parser.add_argument("--workers", type=int, default=4, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path("reports"), help="of the reports (reports)")
    options = parser.parse_args()
    if options.seeds < 1 or options.workers < 1:
        parser.error(f"--seeds={options.seeds} and --workers={options.workers} must be at least 1")
    runs = planned(options.seeds, options.models, options.extended)
    if not runs:
        parser.error("--models and --extended are both empty: nothing would run")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = [HEAD]
    wrong: list[str] = []
    for run in runs:
        ended = run_matrix(
            options.folder / run.name,
            models=run.models,
            seed=run.seed,
            workers=options.workers,
            more=("--fsdp-tier", run.tier),
        )
        if not ended.results:
            print(ended.log.read_text(encoding="utf-8"))
            raise SystemExit(f"no rows of {run}: pytest ended with {ended.status}")
        rows.append(row(run, ended.results, ended.seconds))
        wrong += [f"seed {run.seed}: {line}" for line in failures(ended.results)]
        if ended.status and not failures(ended.results):
            wrong.append(f"seed {run.seed}: pytest ended with {ended.status}, see {ended.log}")
        print("  ".join(rows[-1]), flush=True)
    widths = [max(len(line[column]) for line in rows) for column in range(len(HEAD))]
    print()
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\n" + ("\n".join(wrong) if wrong else "no false alarm"))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
