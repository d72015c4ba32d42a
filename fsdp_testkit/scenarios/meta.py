"""A load under observation: what it allocates, what it initialises, what it leaves behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, has_loaded, reply, resolve_plan, resolved, torch_dtype, tree_of
from fsdp_testkit.scenarios.environment import watching_environment
from fsdp_testkit.scenarios.memory import MemorySampler, stray_bytes
from fsdp_testkit.scenarios.poison import poisoned_memory
from fsdp_testkit.scenarios.reading import counting_reads
from fsdp_testkit.scenarios.traffic import COLLECTIVES


def run(context: Any, *, case: str, checkpoint: str) -> dict[str, Any]:
    """Load once without observation (imports, caches) where these ranks have not done so yet, then once with it.

    Facts: ``load`` with ``allocated`` (bytes of all new storages), ``largest`` and ``gathered`` (bytes, the latter
    of what collectives return), ``init_calls`` and ``init_elements`` (random or constant initialisation of real
    memory), ``shard_bytes`` (bytes that this rank keeps), ``model_bytes``, ``read`` (bytes taken out of mapped
    files), ``read_calls`` (bytes that system calls read), ``checkpoint_bytes`` (of the weight files), ``stray``
    (bytes of live tensors that the load leaves beside the model), ``memory`` (peak, end and timeline of anonymous
    and shared pages; see `MemorySampler`), ``environment`` (see `EnvironmentChanges`), ``seconds``.
    """
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    with armed(parsed, context) as backend:
        _, model_class = resolved(parsed.model)
        plan = resolve_plan(parsed, tree_of(parsed.model) if parsed.plan == "manual" else {})
        if not has_loaded(parsed):
            Loaded(parsed, backend, Path(checkpoint))
        stray = stray_bytes(nn.Module())
        poison = poisoned_memory(parsed.option("poison", "nan"))
        with (
            watching_environment() as environment,
            counting_reads() as reads,
            MemorySampler(0.001) as memory,
            counting_inits() as inits,
            AllocationCounter() as counter,
            poison,
        ):
            began = time.perf_counter()
            model: nn.Module = backend.load(
                Path(checkpoint),
                model_class=model_class,
                layout=parsed.layout,
                plan=plan,
                dtype=torch_dtype(parsed.dtype),
            )
            seconds = time.perf_counter() - began
        stray = stray_bytes(model) - stray
        switches = getattr(backend, "switches", {})
    parameters = dict(model.named_parameters())
    evidence.facts["parameters"] = observe.observe_parameters(model)
    evidence.facts["load"] = {
        "allocated": counter.total,
        "largest": counter.largest,
        "gathered": counter.gathered,
        "init_calls": inits["calls"],
        "init_elements": inits["elements"],
        "init_names": inits["names"][:20],
        "shard_bytes": sum(observe.local(p).numel() * p.element_size() for p in parameters.values()),
        "model_bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in model.buffers()),
        "largest_bytes": max(p.numel() * p.element_size() for p in parameters.values()),
        "read": reads.mapped,
        "read_calls": reads.calls - memory.own_reads,
        "checkpoint_bytes": sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors")),
        "stray": stray,
        "memory": memory.facts(),
        "environment": environment.facts(switches) | {"switches": dict(switches)},
        "seconds": seconds,
    }
    observe.observe_tensors(parameters.items(), evidence, "initial/")
    observe.observe_buffers(model, evidence)
    return reply(context, evidence)


class AllocationCounter(TorchDispatchMode):  # type: ignore[misc] # torch is untyped here
    """Count bytes of storages that operators return for the first time, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0
        self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the local tensors
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and result.is_meta:
            return result  # most of a load: it builds the model there
        known = {storage for item in flat(args) if (storage := address(item))}
        for item in flat(result):
            storage = address(item)
            if storage and storage not in known:
                size = item.untyped_storage().nbytes()
                self.total += size
                self.largest = max(self.largest, size)
                if func.namespace in COLLECTIVES:
                    self.gathered += size
        return result


def flat(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)


def address(tensor: torch.Tensor) -> int:
    """Return the storage's address; 0 for meta tensors, wrappers and empty ones."""
    if tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter):
        return 0
    storage = tensor.untyped_storage()
    return int(storage.data_ptr()) if storage.nbytes() else 0


@contextlib.contextmanager
def counting_inits() -> Iterator[dict[str, Any]]:
    """Count calls of ``torch.nn.init`` functions and of in-place random fills on real memory."""
    counts: dict[str, Any] = {"calls": 0, "elements": 0, "names": []}
    owners: list[tuple[Any, str, Any]] = [
        (nn.init, name, function)
        for name, function in vars(nn.init).items()
        if name.endswith("_") and not name.startswith("_") and callable(function)
    ]
    owners += [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in ("normal_", "uniform_", "random_")]
    depth = {"level": 0}

    def wrap(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else kwargs.get("tensor")
            if depth["level"] == 0 and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                plain = observe.local(tensor)
                if not plain.is_meta and plain.numel():
                    counts["calls"] += 1
                    counts["elements"] += plain.numel()
                    counts["names"].append(name)
            depth["level"] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth["level"] -= 1

        return counted

    for owner, name, function in owners:
        setattr(owner, name, wrap(name, function))
    try:
        yield counts
    finally:
        for owner, name, function in owners:
            setattr(owner, name, function)
