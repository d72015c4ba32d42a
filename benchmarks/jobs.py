"""What a job costs: ranks forked from a warm server beside newly spawned ones, in one run.

python -m benchmarks.jobs [--ranks 2] [--repeat 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from fsdp_testkit.engine.engine import PRELOAD
from fsdp_testkit.ranks import Harness, Job


def reduce(context: Any) -> dict[str, float]:
    """Import what a training job needs, do one all-reduce, and say so."""
    import torch
    import torch.distributed as dist
    import transformers.modeling_utils  # noqa: F401 (the import is what is measured)

    value = torch.ones(1)
    dist.all_reduce(value)
    context.observe()
    return {"sum": float(value)}


def measure(harness: Harness, ranks: int, repeat: int) -> list[float]:
    """Return seconds of ``repeat`` jobs; the first job of a harness is not among them."""
    job = Job(target="benchmarks.jobs:reduce", world_size=ranks, deadline=300.0)
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        report = harness.run(job)
        seconds.append(time.perf_counter() - started)
        if report.failure is not None:
            raise SystemExit(report.failure.render())
        report.discard()
    return seconds[1:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    medians = {}
    for method in ("forkserver", "spawn"):
        with Harness(start_method=method, preload=PRELOAD) as harness:
            seconds = measure(harness, options.ranks, options.repeat)
        medians[method] = statistics.median(seconds)
        print(f"{method:12} {options.ranks} ranks: median {medians[method]:.3f} s of {len(seconds)} jobs")
    print(f"spawn / forkserver: {medians['spawn'] / medians['forkserver']:.1f} x")


if __name__ == "__main__":
    main()
