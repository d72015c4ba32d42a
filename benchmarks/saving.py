"""Ways to save a sharded model, side by side in one run: time, memory, the cost of waiting for the disk.

python -m benchmarks.saving                                # about 1 GiB in fp32, dense and MoE, on 2 and 4 ranks
python -m benchmarks.saving --mib 8 --repeat 1 --ranks 2   # a look

Every method saves the same weights from warm ranks (forked from a server that has torch and transformers imported),
the methods taking turns. Times are medians of the slowest rank, with a barrier at the end. "worst peak" is what the
worst rank holds in anonymous and shared memory beyond its shard, as a multiple of the largest output file. The
safetensors files of all methods have to hold the same keys, dtypes and values, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading_checkpoints import CLASSES, build
from benchmarks.saving_methods import METHODS
from benchmarks.turns import Runs, take_turns
from fsdp_testkit.engine.engine import PRELOAD
from fsdp_testkit.ranks import Harness, Job

#: What the others are compared with.
BASE = "transformers"
COLUMNS = ("seconds", "x theirs", "fastest", "worst peak: MiB", "x file", "x model")
WIDTHS = (9, 10, 9, 17, 8, 9)


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, write the file."""
    options = _options(arguments)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        preload = (*PRELOAD, "benchmarks.saving_methods", "accelerate")
        with Harness(preload=preload) as harness:
            for kind in options.models:
                # bf16 in the file, fp32 in memory and when saved
                checkpoint = build(kind, options.mib // 2, Path(temporary))
                for ranks in options.ranks:
                    runs = run_case(harness, kind, checkpoint, ranks, options)
                    results.append({"model": kind, "ranks": ranks, "methods": summarise(runs)})
                    print("\n".join(table(results[-1])), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"mib": options.mib, "repeat": options.repeat, "results": results}))
    for result in results:
        if len({found["content"] for found in result["methods"].values() if found["content"]}) > 1:
            raise SystemExit(f"{result['model']} on {result['ranks']} ranks: the methods do not save the same")


def run_case(harness: Harness, kind: str, checkpoint: Path, ranks: int, options: argparse.Namespace) -> Runs:
    """Return what each rank measured in each run of each method."""
    job = Job(
        target="benchmarks.saving_methods:measure",
        world_size=ranks,
        deadline=600.0,
        name=f"{kind} {ranks} ranks",
        args={
            "folder": str(checkpoint),
            "model_class": CLASSES[kind].__name__,
            "target": str(checkpoint.parent / "saved"),
            "files": options.files,
            "period": options.period,
        },
    )
    return take_turns(harness, options.methods, options.repeat, job)


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return method -> medians over its runs: seconds, peak in bytes and in output files; ratios to `BASE`."""
    found = {}
    for name, turns in runs.items():
        times = [max(rank["seconds"] for rank in run) for run in turns]
        peak = statistics.median(max(rank["peak"] for rank in run) for run in turns)
        first = turns[0][0]
        found[name] = {
            "seconds": statistics.median(times),
            "all_seconds": times,
            "peak": peak,
            "peak_in_files": peak / first["largest_file"],
            "peak_in_models": peak / first["model_bytes"],
            "largest_file": first["largest_file"],
            "written": first["written"],
            "model_bytes": first["model_bytes"],
            "content": first["content"],
            "timelines": [rank["timeline"] for rank in turns[len(turns) // 2]],
        }
    if BASE in found:
        for method in found.values():
            method["ratio"] = method["seconds"] / found[BASE]["seconds"]
    return found


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one case's table."""
    methods = result["methods"]
    first = next(iter(methods.values()))
    yield ""
    yield (
        f"{result['model']}, {result['ranks']} ranks: model of {first['model_bytes'] / 2**20:,.0f} MiB, "
        f"median of {len(first['all_seconds'])}"
    )
    yield "".join(f"{title:>{width}}" for title, width in zip(("method", *COLUMNS), (20, *WIDTHS), strict=True))
    for name, found in methods.items():
        numbers = (
            f"{found['seconds']:.3f}",
            f"{found['ratio']:.2f}" if "ratio" in found else "",
            f"{min(found['all_seconds']):.3f}",
            f"{found['peak'] / 2**20:,.1f}",
            f"{found['peak_in_files']:.2f}",
            f"{found['peak_in_models']:.3f}",
        )
        yield f"{name:>20}" + "".join(f"{text:>{width}}" for text, width in zip(numbers, WIDTHS, strict=True))
    for plain in ("ours", "ours, dcp"):
        if plain in methods and f"{plain}, fsync" in methods:
            extra = methods[f"{plain}, fsync"]["seconds"] - methods[plain]["seconds"]
            yield f"{plain}: waiting for the disk takes {extra:.3f} s more"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.saving", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=sorted(CLASSES), default=sorted(CLASSES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--mib", type=int, default=1024, help="size of what is saved")
    parser.add_argument("--files", type=int, default=4, help="number of files that it is divided into, about")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--period", type=float, default=0.002, help="seconds between two samples of memory")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints go for the time of the run")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    for name in ("mib", "files", "repeat"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    if min(options.ranks) < 1:
        parser.error(f"--ranks {options.ranks} must be at least 1")
    return options


if __name__ == "__main__":
    main()
