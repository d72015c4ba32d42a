"""A few ranks for these tests: `run(function, world, *args)` calls ``function(rank, *args)`` on each."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# what ranks need, imported once by the fork server
PRELOAD = [
    "fsdp_testkit.backends.reference",
    "fsdp_testkit.reference.load",
    "fsdp_testkit.reference.save",
    "fsdp_testkit.reference.training",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "torch._dynamo",  # fully_shard's first forward imports it
    "pytest",
]


def run(function: Any, world: int, *args: Any) -> None:
    """Run ``function`` on ``world`` gloo ranks; raises if any of them does."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.start_processes(_entry, (function, world, store, args), nprocs=world, start_method="forkserver")


def _entry(rank: int, function: Any, world: int, store: str, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
