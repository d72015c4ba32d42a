"""A model on the meta device whose buffers can still be computed.

Constructing a model on meta costs no memory, but leaves its buffers without values, and those that no checkpoint
holds (rotary frequencies, masks) exist only as code in the constructor. So the constructor is recorded: every
tensor operation it makes on meta is noted, and for a given buffer the few that lead to it are run again for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fsdp_testkit.reference.adapter import (
    TorchDispatchMode,
    written_arguments,
)

META = torch.device("meta")
LITERALS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


@dataclass
class _Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @cached_property
    def read(self) -> frozenset[int]:
        """Identities of the storages on meta that go in."""
        return _storages(tensors_in((self.args, self.kwargs)))

    @property
    def outputs(self) -> list[torch.Tensor]:
        return tensors_in(self.result)

    @cached_property
    def written(self) -> frozenset[int]:
        """Identities of the storages on meta that it made or wrote into."""
        changed = written_arguments(self.function, self.args, self.kwargs)
        return _storages([*self.outputs, *tensors_in(changed)])


class Recorder:
    """Notes the operations on meta tensors while `recording`, and replays those that a tensor depends on."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Create tensors on meta and note every operation on them."""
        with torch.device("meta"), _Mode(self), _Functions(self):
            yield

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add one call to the record. Tensors are held, so that their storages' identities stay theirs."""
        if any(not tensor.is_meta for tensor in tensors_in((args, kwargs))):
            # a real tensor may be written later in the constructor; what counts is its value now
            args, kwargs = mapped((args, kwargs), _freeze)
        self._calls.append(_Call(function, args, kwargs, result))

    def compute(self, tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the value that ``tensor`` (on meta) would have, by running its history on the CPU.

        The result is a new tensor of the same shape, strides and dtype on ``device``. Random operations draw
        from the current generators.

        Raises:
            LookupError: the record does not hold the tensor's creation.
        """
        if not tensor.is_meta:  # made from data that has a device of its own
            return tensor.detach().clone().to(device)
        needed = {_storage(tensor)}
        history: list[_Call] = []
        for call in reversed(self._calls):
            # an operation matters when it made, or wrote into, a storage that matters
            if not needed.isdisjoint(call.written):
                history.append(call)
                needed.update(call.read)
        real: dict[int, torch.Tensor] = {}
        for call in reversed(history):
            self._replay(call, real)
        return _view(tensor, real).clone(memory_format=torch.preserve_format).to(device)

    def _replay(self, call: _Call, real: dict[int, torch.Tensor]) -> None:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                return _view(leaf, real)
            return torch.device("cpu") if isinstance(leaf, torch.device) and leaf == META else leaf

        result = call.function(*mapped(call.args, value), **mapped(call.kwargs, value))
        produced = tensors_in(result)
        for output, made in zip(call.outputs, produced, strict=True):
            if output.is_meta and _storage(output) not in real:
                real[_storage(output)] = _laid_out(made, output)


class _Functions(TorchFunctionMode):  # type: ignore[misc]  # torch's classes are untyped here
    """What has to be seen before it becomes operations.

    ``torch.tensor(data)`` is made a real tensor first: straight to meta, its data would pass no recorded operation.
    Functions of ``torch.nn.init`` are noted as they are and not run, since on meta they change nothing: a constructor
    calls one or two for each layer, and their operations are a third of its time.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__module__", "") == nn.init.__name__:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                self.recorder.note(function, args, kwargs, filled)
                return filled
        device = kwargs.get("device")
        if function not in LITERALS or (device is not None and torch.device(device) != META):
            return function(*args, **kwargs)
        data = args[0] if args else kwargs.get("data")
        if isinstance(data, torch.Tensor) and data.is_meta:
            return function(*args, **kwargs)
        grad = bool(kwargs.pop("requires_grad", False))
        return function(*args, **(kwargs | {"device": "cpu"})).to(META).requires_grad_(grad)


class _Mode(TorchDispatchMode):  # type: ignore[misc]  # torch's classes are untyped here
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves_meta = function is torch.ops.aten._local_scalar_dense.default or any(
            isinstance(leaf, torch.device) and leaf != META for leaf in (*args, *kwargs.values())
        )
        if leaves_meta and any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
            # the constructor asks for a value (`.item()`, `.to("cpu")`): give it the real one
            args, kwargs = mapped((args, kwargs), self.real_value)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        self.recorder.note(function, args, kwargs, result)
        return result

    def real_value(self, leaf: Any) -> Any:
        return self.recorder.compute(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts; operators take and return nothing else."""
    found: list[torch.Tensor] = []
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            left.extend(reversed(item.values()))
        elif isinstance(item, list | tuple):
            left.extend(reversed(item))
    return found


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested tuples, lists and dicts with every leaf changed."""
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return change(value)


def _laid_out(made: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """Return ``made`` on a storage that views recorded on meta fit."""
    if made.stride() == recorded.stride() and made.storage_offset() == recorded.storage_offset():
        return made
    base = made.new_empty(recorded.untyped_storage().nbytes() // recorded.element_size())
    base.as_strided(recorded.size(), recorded.stride(), recorded.storage_offset()).copy_(made)
    return base


def _storages(tensors: list[torch.Tensor]) -> frozenset[int]:
    return frozenset(_storage(tensor) for tensor in tensors if tensor.is_meta)


def _storage(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _freeze(leaf: Any) -> Any:
    return leaf if not isinstance(leaf, torch.Tensor) or leaf.is_meta else leaf.detach().clone()


def _view(tensor: torch.Tensor, real: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the real counterpart of a meta tensor: the same window on the real storage."""
    if _storage(tensor) not in real:
        raise LookupError("this tensor was not created while recording")
    base = real[_storage(tensor)]
    window = torch.empty(0, dtype=tensor.dtype)
    window.set_(base.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return window
