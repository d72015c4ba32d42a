"""Run one test of transformers' own ``FSDPTesterMixin`` in this process, with a fault in its ranks.

python -m benchmarks.upstream_tests FILE TEST LABEL FAULT

``FILE`` is ``tests/test_fsdp_mixin.py`` of a source distribution of transformers; it is not part of the wheel. Two
modules that it imports are not in the distribution either, and have a stand-in here: ``parameterized`` (labels are
given by the caller) and ``distributed_testing_utils`` (ranks are spawned, on gloo).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.layout import Layout

PACKAGE = "upstream_tests_of_transformers"


def load(file: Path, fault: str) -> Any:
    """Import the mixin's file under `PACKAGE`, with the stand-ins in place."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(file.parent)]
    utilities = types.ModuleType(f"{PACKAGE}.distributed_testing_utils")
    vars(utilities).update(
        _get_distributed_backend=lambda: "gloo",
        _get_distributed_device_type=lambda: "cpu",
        _get_rank_device=lambda _: torch.device("cpu"),
        _set_rank_device=lambda _: None,
        _start_rank_processes=lambda target, args, nprocs: start(file, fault, target, args, nprocs),
    )
    labels: Any = types.ModuleType("parameterized")
    labels.parameterized = types.SimpleNamespace(expand=lambda _: lambda function: function)
    sys.modules.update({PACKAGE: package, utilities.__name__: utilities, "parameterized": labels})
    name = f"{PACKAGE}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def start(file: Path, fault: str, target: Any, args: tuple[Any, ...], nprocs: int) -> None:
    """Spawn the ranks and wait for them; a rank that died is an error that names it, as upstream has it."""
    work = pickle.dumps((target, args))  # read only where the module is imported
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(file, fault, rank, nprocs, work)) for rank in range(nprocs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if failed := {index: rank.exitcode for index, rank in enumerate(ranks) if rank.exitcode}:
        raise RuntimeError(f"ranks ended with {failed}")


def run_rank(file: Path, fault: str, rank: int, world_size: int, work: bytes) -> None:
    """Arm the fault and run upstream's function for one rank."""
    load(file, fault)
    target, args = pickle.loads(work)
    if not fault:
        target(rank, *args)
        return
    from benchmarks import upstream_faults

    case = Case(model=ModelSpec(model_type="llama"), layout=Layout(kind="fsdp", shard=world_size))
    armed = getattr(upstream_faults, fault)()
    with armed.arm(rank=rank, world_size=world_size, case=case):
        try:
            target(rank, *args)
        finally:
            print(f"hits on rank {rank}: {armed.hits}", flush=True)


def main(file: str, test: str, label: str, fault: str) -> None:
    """Run the test; exit with 1 and its message where it fails."""
    module = load(Path(file), fault)

    class Tests(module.FSDPTesterMixin, unittest.TestCase):  # type: ignore[misc,name-defined]
        model_tester = types.SimpleNamespace(get_config=config)

    try:
        getattr(Tests(test), test)(*([label] if label else []))
    except unittest.SkipTest as skip:
        raise SystemExit(f"skipped: {skip}") from None
    except AssertionError as error:
        print(error, flush=True)
        raise SystemExit(1) from None


def config() -> Any:
    """Return what a model tester of transformers returns for a small llama."""
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, vocab_size=99, intermediate_size=128)


if __name__ == "__main__":
    main(*sys.argv[1:])
