"""Many small jobs in one session: ``python tests/ranks/soak.py 10000``. Nothing may grow, and no job may get slower."""

# ruff: noqa: T201 - a script's output is what it prints

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from fsdp_testkit.ranks import Harness, Job  # noqa: E402 - found by the line above

#: By how much threads, open files and memory may grow.
GROWTH = 0.01
#: How much more CPU time a job may take in the end: the clock ticks in hundredths, and caches are shared.
SLOWER = 0.25


def usage(pid: int) -> dict[str, int]:
    """Return threads, open files and resident KiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
        "memory (KiB)": int(status["VmRSS"].split()[0]),
    }


def spent(harness: Harness) -> float:
    """Return the CPU seconds of the parent, the rank server and all ranks that have ended.

    Wall time would measure what else runs on the machine.
    """
    total = time.process_time()
    for link in harness._links.values():
        fields = Path(f"/proc/{link.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def growth(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return what has grown too much."""
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if after[name] > before[name] * (1 + GROWTH)]


def soak(jobs: int) -> list[str]:
    """Run the jobs; return what is wrong."""
    seconds: list[float] = []
    with Harness(preload=("torch.distributed",)) as harness:

        def run(count: int) -> None:
            for _ in range(count):
                begun = spent(harness)
                report = harness.run(Job(target="fault_targets:state", world_size=2, deadline=120))
                seconds.append(spent(harness) - begun)
                if report.outcome != "passed":
                    raise SystemExit(report.failure.render() if report.failure else report.outcome)
                report.discard()

        def look() -> dict[str, dict[str, int]]:
            gc.collect()
            return {"parent": usage(os.getpid()), "rank server": usage(next(iter(harness._links.values())).process.pid)}

        # Allocators and caches fill up first; that ends, a leak does not.
        run(warm := max(20, jobs // 10))
        before = look()
        run(jobs - warm)
        after = look()
        left = [path.name for path in harness.folder.iterdir() if path.is_dir()]
    problems = [f"{who}: {text}" for who in before for text in growth(before[who], after[who])]
    for who in before:
        print(who, {name: f"{before[who][name]} -> {after[who][name]}" for name in before[who]})
    parts = slices(seconds[warm:])
    print("CPU seconds a job, by tenths:", " ".join(f"{part:.3f}" for part in parts))
    if min(parts[-3:]) > min(parts[:3]) * (1 + SLOWER):
        problems.append(f"jobs get slower: {parts}")
    if left:
        problems.append(f"{len(left)} folders are left")
    return problems


def slices(values: Sequence[float]) -> list[float]:
    """Return the means of ten parts."""
    size = max(1, len(values) // 10)
    return [statistics.fmean(values[index : index + size]) for index in range(0, size * 10, size) if values[index:]]


def main() -> int:
    """Run; return the number of problems."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    begun = time.monotonic()
    problems = soak(jobs)
    print(f"{jobs} jobs of 2 ranks in {time.monotonic() - begun:.0f} s: {'; '.join(problems) or 'nothing grows'}")
    return len(problems)


if __name__ == "__main__":
    sys.exit(min(1, main()))
