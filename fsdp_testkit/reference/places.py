"""The memory of a sharded model: for each parameter and buffer on meta, this rank's real part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.build import Recorder
from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.grouping import Unit


class Places:
    """The real tensors of this rank, one per parameter or buffer of the sharded meta model."""

    def __init__(self, model: Any, cut: list[Unit], mesh: Any, device: torch.device) -> None:
        self.model = model
        self.mesh = mesh
        self.device = device
        self.offloaded: set[int] = set()
        taken: set[int] = set()
        for unit in cut:  # children first: what an inner unit took is not the outer one's
            for name in unit.modules:
                for parameter in model.get_submodule(name).parameters():
                    if id(parameter) not in taken and unit.options.cpu_offload:
                        self.offloaded.add(id(parameter))
                    taken.add(id(parameter))
        self.tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.real: dict[int, torch.Tensor] = {}

    @property
    def shard(self) -> int:
        """This rank's coordinate on the mesh's shard axis."""
        return int(self.mesh.get_coordinate()[-1])

    def is_sharded(self, name: str) -> bool:
        """Return whether ranks hold different rows of the tensor."""
        return isinstance(self.tensors[name], DTensor)

    def part_of(self, name: str, shard: int) -> tuple[int, tuple[int, ...]]:
        """Return (first row, shape) of what ranks of coordinate ``shard`` hold; the whole where nothing is sharded."""
        tensor = self.tensors[name]
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return 0, shape
        if tensor.placements[-1] != Shard(0):
            raise AssertionError(f"{name} has placements {tensor.placements}")
        # torch.chunk's rule: equal chunks, rounded up, so that the last ones may be short or empty
        rows = shape[0]
        chunk = -(-rows // self.mesh.size(self.mesh.ndim - 1))
        start = min(rows, chunk * shard)
        return start, (min(chunk, rows - start), *shape[1:])

    def nbytes(self, name: str) -> int:
        """Return the bytes of this rank's part."""
        return math.prod(self.part_of(name, self.shard)[1]) * int(self.tensors[name].element_size())

    def whole_nbytes(self, name: str) -> int:
        """Return the bytes of the whole tensor."""
        return int(self.tensors[name].numel() * self.tensors[name].element_size())

    def window(self, name: str) -> tuple[torch.Tensor, int]:
        """Return (this rank's part of the tensor, uninitialised if new; its first row)."""
        tensor = self.tensors[name]
        start, shape = self.part_of(name, self.shard)
        if id(tensor) not in self.real:
            self.real[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device=self._device_of(tensor))
        return self.real[id(tensor)], start

    def can_adopt(self, name: str, dtype: torch.dtype) -> bool:
        """Return whether a view of a file's map with values of ``dtype`` can be this rank's part as it is."""
        tensor = self.tensors[name]
        return tensor.dtype == dtype and self._device_of(tensor).type == "cpu" and id(tensor) not in self.real

    def adopt(self, name: str, part: torch.Tensor) -> None:
        """Take ``part`` as this rank's part of the tensor."""
        self.real[id(self.tensors[name])] = part

    def allocate(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Return name -> tensor to be filled: a `DTensor` over this rank's part, or the tensor itself."""
        return {name: self._wrapped(self.tensors[name], self.window(name)[0]) for name in sorted(names)}

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        return torch.device("cpu") if id(tensor) in self.offloaded else self.device

    def fill_spare(self, spare: dict[str, torch.Tensor], recorder: Recorder) -> None:
        """Compute what no file gave, by the model's own constructor and initialisation."""
        # the same random values, if any, on every rank; the caller's generators stay untouched
        with _seeded():
            for name, recorded in spare.items():
                out, start = self.window(name)
                try:
                    value = recorder.compute(recorded)
                except LookupError as error:
                    raise LoadError(f"{name!r} is in no file, and cannot be computed: {error}") from error
                out.copy_(value[start : start + out.shape[0]] if out.ndim else value)

    def install(self) -> None:
        """Put the real tensors into the model, one object for all places of a tied parameter."""
        fresh: dict[int, torch.Tensor] = {}
        for module in self.model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in self.real:
                        raise LoadError(f"no value for {name!r} of {type(module).__name__}")
                    if id(tensor) not in fresh:
                        value = self._wrapped(tensor, self.real[id(tensor)])
                        if isinstance(tensor, nn.Parameter):
                            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                        adapter.mark_initialized(value)
                        fresh[id(tensor)] = value
                    setattr(module, name, fresh[id(tensor)])

    def _wrapped(self, tensor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return real
        wrapped: torch.Tensor = DTensor.from_local(
            real,
            self.mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return wrapped


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the CPU's generator inside; values are computed there. `torch.manual_seed` visits every accelerator."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(before)
