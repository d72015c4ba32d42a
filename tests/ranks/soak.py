"""Many small jobs in one session: ``python tests/ranks/soak.py 10000``. Nothing may grow, and no job may get slower."""

# ruff: noqa: T201 - a script's output is what it prints

from __future__ import annotations

import gc
import itertools
import os
import statistics
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from benchmarks.cpu import cpu_seconds  # noqa: E402 - found by the line above
from fsdp_testkit.ranks import Harness, Job  # noqa: E402 - found by the line above

#: By how much threads, open files and memory may grow.
GROWTH = 0.01
#: Parts that the comparison with a fresh harness is made in: their scatter tells chance from growth.
BLOCKS = 20


def usage(pid: int) -> dict[str, int]:
    """Return threads, open files and resident KiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
        "memory (KiB)": int(status["VmRSS"].split()[0]),
    }


def spent(harness: Harness) -> float:
    """Return the CPU seconds of the parent, the rank server and all ranks that have ended."""
    return cpu_seconds(link.process.pid for link in harness._links.values())


def growth(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return what has grown too much."""
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if after[name] > before[name] * (1 + GROWTH)]


def run(harness: Harness, count: int) -> list[float]:
    """Run jobs; return the CPU seconds of each."""
    seconds = []
    for _ in range(count):
        begun = spent(harness)
        report = harness.run(Job(target="fault_targets:state", world_size=2, deadline=120))
        seconds.append(spent(harness) - begun)
        if report.outcome != "passed":
            raise SystemExit(report.failure.render() if report.failure else report.outcome)
        report.discard()
    return seconds


def against_fresh(old: Harness, count: int) -> tuple[float, float]:
    """Run jobs on ``old`` and on a fresh harness in turn.

    Returns:
        (slower, error): by what part of its CPU time a job on the old one takes longer, and the standard error of
        that. Whatever else changes on the machine meanwhile is the same for both.
    """
    with Harness(preload=("torch.distributed",)) as fresh:
        run(fresh, max(20, count // 10))
        parts = []
        for _ in range(BLOCKS):
            one, other = 0.0, 0.0
            for _ in range(max(1, count // BLOCKS)):
                one += run(old, 1)[0]
                other += run(fresh, 1)[0]
            parts.append(one / other - 1.0)
    return statistics.fmean(parts), statistics.stdev(parts) / BLOCKS**0.5


def soak(jobs: int) -> list[str]:
    """Run the jobs; return what is wrong."""
    with Harness(preload=("torch.distributed",)) as harness:

        def look() -> dict[str, dict[str, int]]:
            gc.collect()
            return {"parent": usage(os.getpid()), "rank server": usage(next(iter(harness._links.values())).process.pid)}

        # Allocators and caches fill up first; that ends, a leak does not.
        run(harness, warm := max(20, jobs // 10))
        before = look()
        seconds, sizes = array("d"), array("q")  # of fixed size: what is measured is this process
        for part in parts(jobs - warm):
            seconds.extend(run(harness, part))
            sizes.append(usage(os.getpid())["memory (KiB)"])
        after = look()
        slower, error = against_fresh(harness, warm)
        left = [path.name for path in harness.folder.iterdir() if path.is_dir()]
    problems = [f"{who}: {text}" for who in before for text in growth(before[who], after[who])]
    for who in before:
        print(who, {name: f"{before[who][name]} -> {after[who][name]}" for name in before[who]})
    first, last = statistics.fmean(seconds[:warm]), statistics.fmean(seconds[-warm:])
    print("KiB of the parent, by tenths:", *sizes)
    print("CPU seconds a job, by tenths:", " ".join(f"{part:.4f}" for part in slices(seconds)))
    print(
        f"first {warm}: {first:.4f}, last {warm}: {last:.4f}, {last / first - 1:+.2%} (the machine's changes included)"
    )
    print(f"after {jobs} jobs, in turn with a fresh harness: {slower:+.2%} +- {error:.2%}")
    # A growth beyond the bound that could not be told from chance is no finding; nor is one within it.
    if slower > GROWTH and slower > 2 * error:
        problems.append(f"jobs get slower, by {slower:.2%} +- {error:.2%}")
    if left:
        problems.append(f"{len(left)} folders are left")
    return problems


def parts(count: int) -> list[int]:
    """Return the sizes of at most ten nearly equal parts."""
    edges = [count * index // 10 for index in range(11)]
    return [end - begin for begin, end in itertools.pairwise(edges) if end > begin]


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
