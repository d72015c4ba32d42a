"""What gloo's event threads cost when they may push the sending thread off its core, and when they may not.

python -m benchmarks.scheduling [--ranks 4] [--rounds 200] [--repeat 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from fsdp_testkit.engine.engine import PRELOAD
from fsdp_testkit.ranks import Harness, Job

POLICIES = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH}


def reduce(context: Any, policy: str, rounds: int) -> dict[str, float]:
    """All-reduce small tensors between short pieces of Python; return CPU seconds of all threads and wall seconds."""
    import torch
    import torch.distributed as dist

    os.sched_setscheduler(0, POLICIES[policy], os.sched_param(0))  # the threads of the new group inherit it
    group = dist.new_group()
    values = [torch.ones(1000) for _ in range(8)]
    dist.all_reduce(values[0], group=group)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(rounds):
        for value in values:
            dist.all_reduce(value, group=group)
        sum(range(20_000))
    context.observe()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    """Print the table; the policies take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    with Harness(preload=PRELOAD) as harness:
        for _ in range(options.repeat):
            for policy, rows in figures.items():
                job = Job(
                    target="benchmarks.scheduling:reduce",
                    args={"policy": policy, "rounds": options.rounds},
                    world_size=options.ranks,
                    deadline=300.0,
                )
                report = harness.run(job)
                if report.failure is not None:
                    raise SystemExit(report.failure.render())
                values = [reply.value for reply in report.replies]
                rows.append((sum(value["cpu"] for value in values), max(value["wall"] for value in values)))
                report.discard()
    cpu, wall = ({p: statistics.median(row[i] for row in rows) for p, rows in figures.items()} for i in (0, 1))
    for policy in POLICIES:
        print(f"{policy:6} {options.ranks} ranks: median {cpu[policy]:.2f} CPU s, {wall[policy]:.2f} s wall")
    print(f"batch / other: {cpu['batch'] / cpu['other']:.2f} x CPU, {wall['batch'] / wall['other']:.2f} x wall")


if __name__ == "__main__":
    main()
