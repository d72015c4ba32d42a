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
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fsdp_testkit.reference.adapter import (
    TorchDispatchMode,
    written_arguments,
)

META = torch.device("meta")
#: Operators whose result has no value.
EMPTY = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
LITERALS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor))


@dataclass(slots=True, eq=False)  # not frozen: several are made for each operation, and frozen ones take twice as long
class _Window:
    """Where a tensor on meta lay when a call was noted: ``x.data = y`` or ``x.t_()`` may move it later."""

    storage: Any
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Window:
        return cls(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)

    @property
    def identity(self) -> int:
        """Number of the storage; held here, so that it stays its own."""
        identity: int = self.storage._cdata
        return identity


class _Elsewhere:
    """Stands for a result that is not on meta."""


@dataclass
class _Call:
    """An operation; in place of tensors on meta stand windows."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @cached_property
    def read(self) -> frozenset[int]:
        """Identities of the storages on meta that go in."""
        return _identities((self.args, self.kwargs))

    @cached_property
    def written(self) -> frozenset[int]:
        """Identities of the storages on meta that it made or wrote into."""
        return _identities((self.result, written_arguments(self.function, self.args, self.kwargs)))

    @property
    def filled(self) -> frozenset[int]:
        """Identities of the storages on meta that it gave values: views share theirs, and ``empty`` gives none."""
        made = _identities(self.result)
        if isinstance(self.function, torch._ops.OpOverload):
            if self.function.overloadpacket.__name__ in EMPTY:
                return frozenset()
            made -= self.read
        return made | _identities(written_arguments(self.function, self.args, self.kwargs))


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
        """Add one call to the record; ``args`` and ``kwargs`` as `before` gave them."""
        self._calls.append(_Call(function, args, kwargs, mapped(result, _placed)))

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to note of arguments: a call may move them, and a real tensor may be written later."""
        return mapped(args, _windowed), mapped(kwargs, _windowed)

    def compute(self, tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the value that ``tensor`` (on meta) would have, by running its history on the CPU.

        The result is a new tensor of the same shape, strides and dtype on ``device``. Random operations draw
        from the current generators.

        Raises:
            LookupError: the record does not hold the tensor's creation, or nothing that gives it a value.
        """
        if not tensor.is_meta:  # made from data that has a device of its own
            return tensor.detach().clone().to(device)
        window = _Window.of(tensor)
        needed = {window.identity}
        history: list[_Call] = []
        for call in reversed(self._calls):
            # an operation matters when it made, or wrote into, a storage that matters
            if not needed.isdisjoint(call.written):
                history.append(call)
                needed.update(call.read)
        if history and tensor.numel() and not any(window.identity in call.filled for call in history):
            raise LookupError("nothing in the record gives this tensor a value")
        real: dict[int, torch.Tensor] = {}
        for call in reversed(history):
            self._replay(call, real)
        return _view(window, real).clone(memory_format=torch.preserve_format).to(device)

    def _replay(self, call: _Call, real: dict[int, torch.Tensor]) -> None:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, _Window):
                return _view(leaf, real)
            return torch.device("cpu") if isinstance(leaf, torch.device) and leaf == META else leaf

        result = call.function(*mapped(call.args, value), **mapped(call.kwargs, value))
        produced = leaves(result, torch.Tensor)
        for output, made in zip(leaves(call.result, _Window | _Elsewhere), produced, strict=True):
            if isinstance(output, _Window) and output.identity not in real:
                real[output.identity] = _laid_out(made, output)


class _Functions(TorchFunctionMode):  # type: ignore[misc]  # torch's classes are untyped here
    """What has to be seen before it becomes operations.

    ``torch.tensor(data)`` is made a real tensor first: straight to meta, its data would pass no recorded operation.
    Those functions of ``torch.nn.init`` that modes see (the uniform, normal and constant ones) are noted as they are
    and not run, since on meta they change nothing: a constructor calls one or two for each layer, and their operations
    are a third of its time.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in LITERALS:
            # most calls are of builtins, such as the getter of a shape
            if type(function) is FunctionType and function.__module__ == nn.init.__name__:
                filled = args[0] if args else kwargs.get("tensor")
                if isinstance(filled, torch.Tensor) and filled.is_meta:
                    self.recorder.note(function, *self.recorder.before(args, kwargs), filled)
                    return filled
            return function(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device) != META:
            return function(*args, **kwargs)
        kwargs = dict(kwargs)
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
        if leaves_meta and any(tensor.is_meta for tensor in leaves((args, kwargs), torch.Tensor)):
            # the constructor asks for a value (`.item()`, `.to("cpu")`): give it the real one
            args, kwargs = mapped((args, kwargs), self.real_value)
            return function(*args, **kwargs)
        noted = self.recorder.before(args, kwargs)
        result = function(*args, **kwargs)
        self.recorder.note(function, *noted, result)
        return result

    def real_value(self, leaf: Any) -> Any:
        return self.recorder.compute(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf


def leaves(value: Any, kind: Any) -> list[Any]:
    """Return what is of a kind in nested tuples, lists and dicts; operators take and return nothing else."""
    found: list[Any] = []
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, kind):
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


def _laid_out(made: torch.Tensor, recorded: _Window) -> torch.Tensor:
    """Return ``made`` on a storage that views recorded on meta fit."""
    if made.stride() == recorded.stride and made.storage_offset() == recorded.offset:
        return made
    base = made.new_empty(recorded.storage.nbytes() // recorded.dtype.itemsize)
    base.as_strided(recorded.size, recorded.stride, recorded.offset).copy_(made)
    return base


def _identities(value: Any) -> frozenset[int]:
    return frozenset(window.identity for window in leaves(value, _Window))


def _windowed(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # of a real tensor, which may be written later in the constructor, its value now counts
    return _Window.of(leaf) if leaf.is_meta else leaf.detach().clone()


def _placed(leaf: Any) -> Any:
    """Return what to note of a result; a real tensor is not held: where it goes in, its value is noted then."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return _Window.of(leaf) if leaf.is_meta else _Elsewhere()


def _view(window: _Window, real: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the real counterpart of a meta tensor: the same window on the real storage."""
    if window.identity not in real:
        raise LookupError("this tensor was not created while recording")
    made = torch.empty(0, dtype=window.dtype)
    made.set_(real[window.identity].untyped_storage(), window.offset, window.size, window.stride)
    return made
