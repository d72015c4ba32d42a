"""Ways to load a checkpoint as a sharded model, side by side in one run: time, memory, bytes read.

python -m benchmarks.loading                             # about 1 GiB, dense and MoE, fp32 and bf16, 2 and 4 ranks
python -m benchmarks.loading --mib 8 --repeat 1 --ranks 2  # a look

Every method loads the same files on warm ranks (forked from a server that has torch and transformers imported, and each
has loaded a small checkpoint by the same method; the files are in the page cache), the methods taking turns. Times are
medians of the slowest rank; memory is anonymous plus shared pages above the start, sampled by a thread: pages of the
mapped checkpoint are the page cache's. The checksums of all local shards have to be equal among the methods, or the run
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading_checkpoints import CLASSES, build
from benchmarks.loading_methods import METHODS
from benchmarks.turns import Runs, take_turns
from fsdp_testkit.engine.engine import PRELOAD
from fsdp_testkit.ranks import Harness, Job

COLUMNS = ("seconds", "cpu seconds", "creation s", "sum of peaks", "worst peak", "read")
DTYPES = ("float32", "bfloat16")
#: MiB of the checkpoint that warms a rank.
SMALL = 2


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, write the files."""
    options = _options(arguments)
    cases = [(k, d, r) for k in options.models for d in options.dtypes for r in options.ranks]
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder if options.keep else Path(temporary)
        preload = (*PRELOAD, "benchmarks.loading_methods", "accelerate", "accelerate.utils.fsdp_utils")
        with Harness(preload=preload) as harness:
            for kind, dtype, ranks in cases:
                runs = run_case(harness, kind, folder, dtype, ranks, options)
                summary = {name: summarise(found) for name, found in runs.items()}
                same = len({tuple(s["checksums"]) for s in summary.values()}) == 1
                results.append({"model": kind, "dtype": dtype, "ranks": ranks, "equal": same, "methods": summary})
                print("\n".join(table(results[-1])), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"mib": options.mib, "repeat": options.repeat, "results": results}))
    if options.plot:
        from benchmarks.loading_plot import draw

        draw(results, options.plot)
    if not all(result["equal"] for result in results):
        raise SystemExit("the methods do not load the same weights")


def run_case(harness: Harness, kind: str, folder: Path, dtype: str, ranks: int, options: argparse.Namespace) -> Runs:
    """Return what each rank measured in each run of each method."""
    job = Job(
        target="benchmarks.loading_methods:measure",
        world_size=ranks,
        deadline=600.0,
        name=f"{kind} {dtype} {ranks} ranks",
        args={
            "folder": str(build(kind, options.mib, folder)),
            "small": str(build(kind, SMALL, folder)),
            "model_class": CLASSES[kind].__name__,
            "dtype": dtype,
            "period": options.period,
        },
    )
    return take_turns(harness, options.methods, options.repeat, job)


def summarise(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over runs; memory in multiples of the model's bytes, other sizes in bytes.

    ``cpu`` is the processor time of all ranks, the sampler's included; ``creation`` is the time until the slowest
    rank but the first has a model object; ``timelines`` are those of the run of median time, by rank.
    """
    size = runs[0][0]["model_bytes"]
    times = [max(rank["seconds"] for rank in run) for run in runs]
    middle = runs[sorted(range(len(runs)), key=times.__getitem__)[len(runs) // 2]]

    def median(of: Any) -> float:
        return float(statistics.median(of(run) for run in runs))

    return {
        "seconds": statistics.median(times),
        "all_seconds": times,
        "cpu": median(lambda run: sum(rank["cpu"] for rank in run)),
        "creation": median(lambda run: max(rank["creation"] for rank in run[1:] or run)),
        "sum_of_peaks": median(lambda run: sum(rank["peak"] for rank in run)) / size,
        "worst_peak": median(lambda run: max(rank["peak"] for rank in run)) / size,
        "bytes_read": median(lambda run: sum(rank["bytes_read"] for rank in run)),
        "model_bytes": size,
        "largest": runs[0][0]["largest"] / size,
        "checksums": [rank["checksum"] for rank in middle],
        "timelines": [rank["timeline"] for rank in middle],
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one case's table."""
    methods = result["methods"]
    first = next(iter(methods.values()))
    size, largest = first["model_bytes"] / 2**20, first["largest"]
    yield ""
    yield (
        f"{result['model']}, bf16 to {result['dtype']}, {result['ranks']} ranks; model {size:,.0f} MiB, "
        f"largest tensor {largest:.3f} of it"
    )
    yield f"{'method':24}" + "".join(f"{name:>14}" for name in COLUMNS) + "   checksum"
    for name, row in methods.items():
        digest = f"{hash(tuple(row['checksums'])) & 0xFFFFFFFF:08x}"
        cells = (
            f"{row['seconds']:.3f}",
            f"{row['cpu']:.3f}",
            f"{row['creation']:.3f}",
            f"{row['sum_of_peaks']:.3f} x",
            f"{row['worst_peak']:.3f} x",
            f"{row['bytes_read'] / 2**20:,.0f} MiB",
        )
        yield f"{name:24}" + "".join(f"{cell:>14}" for cell in cells) + f"   {digest}"
    for other in ("transformers", "every rank loads all"):
        ratios = [
            f"{name} {row['seconds'] / methods[other]['seconds']:.2f} x"
            for name, row in methods.items()
            if other in methods and name.startswith("ours")
        ]
        if ratios:
            yield f"time over {other}: {', '.join(ratios)}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(CLASSES), default=["dense", "moe"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--mib", type=int, default=1024, help="size of a checkpoint (1024)")
    parser.add_argument("--repeat", type=int, default=5, help="measured runs of each method (5); 0: the first only")
    parser.add_argument("--period", type=float, default=0.005, help="seconds between two memory samples (0.005)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the system's temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in --folder for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="memory over time; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    for name in ("mib", *(["ranks"] if min(options.ranks) < 1 else [])):
        value = getattr(options, name)
        if name == "ranks" or value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    if options.repeat < 0 or options.period <= 0:
        parser.error("--repeat must be at least 0, --period more than 0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return options


if __name__ == "__main__":
    main()
