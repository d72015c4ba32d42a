"""Ways to load a checkpoint as a sharded model, one function each, and what a rank measures of one of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import efficient_loading, load_sharded
from fsdp_testkit.scenarios.memory import MemorySampler
from fsdp_testkit.scenarios.reading import counting_reads


def every_rank(folder: Path, cls: Any, dtype: torch.dtype, clock: Clock) -> nn.Module:
    """Every rank loads the whole model and cuts its shards out of it."""
    model = cls.from_pretrained(folder, dtype=dtype)
    clock.created()
    shard(model)
    loaded: nn.Module = model
    return loaded


def broadcast(folder: Path, cls: Any, dtype: torch.dtype, clock: Clock) -> nn.Module:
    """Rank 0 loads the model, the others build it on meta; a full state dict is broadcast into the shards."""
    first = dist.get_rank() == 0
    config = cls.config_class.from_pretrained(folder)
    full: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    if first:
        loaded = cls.from_pretrained(folder, dtype=dtype)
        full, buffers = loaded.state_dict(), dict(loaded.named_buffers())
    with torch.device("meta"):
        model = cls(config).to(dtype)
    clock.created()
    shard(model)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full, options=options)
    for name, buffer in model.named_buffers():
        if first:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    made: nn.Module = model
    return made


def accelerate(folder: Path, cls: Any, dtype: torch.dtype, clock: Clock) -> nn.Module:
    """accelerate's ``cpu_ram_efficient_loading``: its FSDP2 preparation, called directly, on the CPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with efficient_loading():
        model = cls.from_pretrained(folder, dtype=dtype)
        clock.created()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=True,
            mixed_precision_policy=MixedPrecisionPolicy(),
        )
        prepared: nn.Module = fsdp2_prepare_model(
            SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin),
                torch_device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",)),
                parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
                mixed_precision="no",
                device=torch.device("cpu"),
                is_main_process=dist.get_rank() == 0,
            ),
            model,
        )
    return prepared


def transformers_own(folder: Path, cls: Any, dtype: torch.dtype, clock: Clock) -> nn.Module:
    """transformers' own load: sharded while it reads."""
    from transformers.distributed import DistributedConfig

    with clock.watching(cls):
        model: nn.Module = cls.from_pretrained(
            folder, dtype=dtype, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
        )
    return model


def ours(source: str) -> Method:
    """`load_sharded` from a source."""

    def load(folder: Path, cls: Any, dtype: torch.dtype, clock: Clock) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with clock.watching(cls):
            model: nn.Module = load_sharded(folder, mesh, dtype=dtype, model_class=cls, source=source, progress=False)
        return model

    return load


class Clock:
    """Notes when a rank has its model object, before any weight is distributed."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.creation = 0.0

    def created(self) -> None:
        """The model object is there."""
        self.creation = time.perf_counter() - self.began

    @contextlib.contextmanager
    def watching(self, cls: Any) -> Iterator[None]:
        """Add up the time spent in the constructor of ``cls``."""
        original = cls.__init__

        def timed(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            original(*args, **kwargs)
            self.creation += time.perf_counter() - began

        cls.__init__ = timed
        try:
            yield
        finally:
            cls.__init__ = original


Method = Callable[[Path, Any, torch.dtype, Clock], nn.Module]

METHODS: dict[str, Method] = {
    "every rank loads all": every_rank,
    "rank 0, broadcast": broadcast,
    "accelerate": accelerate,
    "transformers": transformers_own,
    "ours, rank0": ours("rank0"),
    "ours, slices": ours("slices"),
}


def shard(model: Any) -> None:
    """Cut a model into the usual units: embedding, each block, final norm with head, and the rest."""
    base = model.model
    fully_shard(base.embed_tokens)
    for layer in base.layers:
        fully_shard(layer)
    fully_shard([base.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def measure(
    context: Any, *, method: str, folder: str, small: str, model_class: str, dtype: str, period: float
) -> dict[str, Any]:
    """Load once and return what it cost this rank, and a checksum of each of its local shards' bytes.

    The same method loads a ``small`` checkpoint first: a rank is new, and what its first load imports, connects and
    copies from the process it was forked from is no matter of the method.
    """
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, model_class)
    load = METHODS[method]
    load(Path(small), cls, getattr(torch, dtype), Clock())
    gc.collect()
    _return_free_memory()
    with counting_reads() as reads, MemorySampler(period) as sampler:
        dist.barrier()
        clock, busy = Clock(), time.process_time()
        model = load(Path(folder), cls, getattr(torch, dtype), clock)
        seconds, busy = time.perf_counter() - clock.began, time.process_time() - busy
    context.observe()
    return {
        "seconds": seconds,
        "cpu": busy,
        "creation": clock.creation,
        "peak": sampler.peak,
        "end": sampler.end,
        "timeline": sampler.timeline(),
        "bytes_read": reads.mapped + reads.calls - sampler.own_reads,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "largest": max(p.numel() * p.element_size() for p in model.parameters()),
        "checksum": checksum(model),
    }


def checksum(model: nn.Module) -> int:
    """Return a CRC over the bytes of all local shards, in the order of the parameters' names."""
    value = 0
    for name, parameter in sorted(model.named_parameters()):
        local = parameter.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        value = zlib.crc32(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode(), value)
        if local.numel():
            value = zlib.crc32(memoryview(local.contiguous().view(torch.uint8).numpy()).cast("B"), value)
    return value


def _return_free_memory() -> None:
    """Give freed memory back to the system, so that what the load takes is seen as growth."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
