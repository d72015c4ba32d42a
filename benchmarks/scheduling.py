"""What gloo's event threads cost when they may push the sending thread off its core, and when they may not.

python -m benchmarks.scheduling [--ranks 4] [--rounds 200] [--repeat 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from benchmarks.turns import take_turns
from fsdp_testkit.engine.engine import PRELOAD
from fsdp_testkit.ranks import Harness, Job

POLICIES = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH}


def reduce(context: Any, method: str, rounds: int) -> dict[str, float]:
    """All-reduce small tensors between short pieces of Python; return CPU seconds of all threads and wall seconds."""
    import torch
    import torch.distributed as dist

    os.sched_setscheduler(0, POLICIES[method], os.sched_param(0))  # the threads of the new group inherit it
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
    job = Job(
        target="benchmarks.scheduling:reduce",
        args={"rounds": options.rounds},
        world_size=options.ranks,
        deadline=300.0,
        name=f"{options.ranks} ranks",
    )
    with Harness(preload=PRELOAD) as harness:
        found = take_turns(harness, list(POLICIES), options.repeat, job)
    cpu, wall = {}, {}
    for policy, runs in found.items():
        cpu[policy] = statistics.median(sum(rank["cpu"] for rank in run) for run in runs)
        wall[policy] = statistics.median(max(rank["wall"] for rank in run) for run in runs)
    for policy in POLICIES:
        print(f"{policy:6} {options.ranks} ranks: median {cpu[policy]:.2f} CPU s, {wall[policy]:.2f} s wall")
    print(f"batch / other: {cpu['batch'] / cpu['other']:.2f} x CPU, {wall['batch'] / wall['other']:.2f} x wall")


if __name__ == "__main__":
    main()
