"""Ways to save a sharded model, one function each, and what a rank measures of one of them."""

from __future__ import annotations

import gc
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.loading_methods import checksum
from fsdp_testkit.reference import load_sharded, save_sharded
from fsdp_testkit.reference.files import Checkpoint
from fsdp_testkit.scenarios.memory import MemorySampler

Save = Callable[[Any, Path, int], None]


def theirs(*, distributed: bool) -> Save:
    """Save with ``save_pretrained``, gathered on rank 0, or with its ``distributed_checkpoint`` flag."""

    def save(model: Any, folder: Path, limit: int) -> None:
        first = dist.get_rank() == 0
        model.save_pretrained(folder, is_main_process=first, distributed_checkpoint=distributed, max_shard_size=limit)

    return save


def ours(layout: str, *, durable: bool) -> Save:
    """Save with `save_sharded`."""

    def save(model: Any, folder: Path, limit: int) -> None:
        save_sharded(model, folder, layout=layout, max_shard_size=limit, durable=durable)

    return save


#: name -> (whether transformers loads the model, the save)
METHODS: dict[str, tuple[bool, Save]] = {
    "transformers": (True, theirs(distributed=False)),
    "ours": (False, ours("safetensors", durable=False)),
    "ours, fsync": (False, ours("safetensors", durable=True)),
    "transformers, dcp": (True, theirs(distributed=True)),
    "ours, dcp": (False, ours("dcp", durable=False)),
    "ours, dcp, fsync": (False, ours("dcp", durable=True)),
}


def load(folder: Path, cls: Any, dtype: torch.dtype, *, by_transformers: bool) -> nn.Module:
    """Return the sharded model, every weight in memory of its own."""
    if by_transformers:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(fsdp_size=dist.get_world_size())
        loaded: nn.Module = cls.from_pretrained(folder, dtype=dtype, distributed_config=config)
        return loaded
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: nn.Module = load_sharded(folder, mesh, dtype=dtype, model_class=cls)
    return model


def measure(
    context: Any, *, method: str, folder: str, model_class: str, target: str, files: int, period: float
) -> dict[str, Any]:
    """Load, save once, and return what the save cost this rank; rank 0 adds what is in the folder, and deletes it.

    Memory is what is anonymous or shared above the start of the save; written pages are the page cache's. All that
    earlier runs wrote is on the disk before the clock starts.
    """
    transformers.utils.logging.disable_progress_bar()
    by_transformers, save = METHODS[method]
    model = load(Path(folder), getattr(transformers, model_class), torch.float32, by_transformers=by_transformers)
    size = sum(parameter.nbytes for parameter in model.parameters())
    limit = -(-size // files)
    first = dist.get_rank() == 0
    gc.collect()
    if first:
        os.sync()
    dist.barrier()
    with MemorySampler(period) as sampler:
        began = time.perf_counter()
        save(model, Path(target), limit)
        dist.barrier()
        seconds = time.perf_counter() - began
    context.observe()
    found = {
        "seconds": seconds,
        "peak": sampler.peak,
        "timeline": sampler.timeline(),
        "model_bytes": size,
        "checksum": checksum(model),
    }
    if first:
        found |= contents(Path(target))
        shutil.rmtree(target)
    dist.barrier()
    return found


def contents(folder: Path) -> dict[str, Any]:
    """Return the largest file's bytes, and for safetensors a CRC over keys, dtypes, shapes and values."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    value = 0
    if any(folder.glob("model*.safetensors")):
        saved = Checkpoint(folder)
        for key in sorted(saved.entries):
            tensor = saved.full(key)
            value = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
            value = zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), value)
    return {"largest_file": max(sizes), "written": sum(sizes), "content": value}
