"""What the tests of a model cost: in ranks forked from a warm server and shared, beside newly spawned ones.

python -m benchmarks.matrix [--models llama,mixtral,gpt2] [--spawned 1] [--json FILE]

Runs the twelve things that transformers' own mixin tests (structure; save and load, and DCP, on one and two mesh
axes; bf16; accumulation under HSDP; the plan beside DDP, tied and untied, and a resume), once as the matrix runs
them and once with every job in newly started processes, in one run. CPU seconds are those of all processes, user
and system; the start of the warm server is reported apart, since a session pays for it once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cpu import cpu_seconds
from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Cell, Engine, Settings

#: The kit's tests that cover what transformers' mixin tests.
CELLS: list[Cell] = [
    ("sharding_structure", "untied"),
    ("sharding_structure", "tied"),
    ("buffers_dtypes", "default"),
    ("auto_vs_ddp", "untied"),
    ("auto_vs_ddp", "tied"),
    ("hsdp_vs_ddp", "untied"),
    ("accumulation", "untied"),
    ("save_load", "untied"),
    ("save_load", "tied"),
    ("dcp", "default"),
    ("resume", "default"),
]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one model took.

    Attributes:
        model: its type.
        wall: seconds.
        cpu: seconds of this process, the server and all ranks.
        rows: outcome -> number of result rows.
        checks: number of checks.
    """

    model: str
    wall: float
    cpu: float
    rows: dict[str, int]
    checks: int


def measure(engine: Engine, model: str, *, together: bool) -> Cost:
    """Run all cells of a model."""
    spec = ModelSpec(model_type=model)
    started, cpu = time.perf_counter(), cpu_seconds()
    if together:
        engine.expect(spec, CELLS)
    rows: list[Result] = [row for cell in CELLS for row in engine.run_test(spec, *cell)]
    outcomes = sorted(row.outcome for row in rows)
    return Cost(
        model=model,
        wall=time.perf_counter() - started,
        cpu=cpu_seconds() - cpu,
        rows={outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
        checks=sum(row.checks for row in rows),
    )


def start(engine: Engine) -> float:
    """Start an engine's server by a first job; return its CPU seconds."""
    before = cpu_seconds()
    engine.run_test(ModelSpec(model_type="llama"), "meta_init", "default")
    return cpu_seconds() - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,mixtral,gpt2,qwen3_next,gemma2", help="model types, by commas")
    parser.add_argument("--spawned", type=int, default=1, help="how many of them also in newly spawned processes")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    models = options.models.split(",")
    ours: list[Cost] = []
    engine = Engine(Settings())
    try:
        first = start(engine)
        for model in models:
            ours.append(measure(engine, model, together=True))
            print(line("shared", ours[-1]), flush=True)
    finally:
        engine.close()
    spawned: list[Cost] = []
    engine = Engine(Settings(start_method="spawn", deadline=600.0))
    try:
        for model in models[: options.spawned]:
            spawned.append(measure(engine, model, together=False))
            print(line("spawned", spawned[-1]), flush=True)
    finally:
        engine.close()
    print(f"start of the warm server and a first job: {first:.1f} CPU s")
    print(f"shared: median {statistics.median(cost.cpu for cost in ours):.2f} CPU s a model")
    for theirs in spawned:
        mine = next(cost for cost in ours if cost.model == theirs.model)
        ratios = f"{theirs.cpu / mine.cpu:.1f} x CPU, {theirs.wall / mine.wall:.1f} x wall"
        print(f"{theirs.model}: spawned / shared = {ratios}")
    if options.json:
        document = {"start": first, "shared": [asdict(c) for c in ours], "spawned": [asdict(c) for c in spawned]}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


def line(method: str, cost: Cost) -> str:
    """Return a line of the table."""
    rows = ", ".join(f"{count} {outcome}" for outcome, count in cost.rows.items())
    return f"{method:8} {cost.model:20} {cost.wall:7.1f} s wall {cost.cpu:7.2f} CPU s   {rows}; {cost.checks} checks"


if __name__ == "__main__":
    main()
