"""Memory that nothing has written yet, filled so that nothing in it can look right by luck."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_testkit.core.case import POISONS
from fsdp_testkit.core.errors import UsageError

#: Magnitude of finite garbage where the dtype can hold it: far from any weight, below fp16's largest number.
GARBAGE = 3.0e4
_EMPTY = tuple(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)


@contextlib.contextmanager
def poisoned_memory(kind: str = "nan") -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin hand out, also through ``to_empty``.

    ``nan``: NaN, and the largest integers. It spreads through arithmetic, so that one element shows everywhere. Under
    deterministic algorithms torch itself does it (``torch.utils.deterministic.fill_uninitialized_memory``,
    https://docs.pytorch.org/docs/stable/deterministic.html).

    ``garbage``: finite numbers of alternating sign, of magnitude `GARBAGE`, as memory in use holds them. They show
    where NaN is caught on its way: by ``nan_to_num``, ``where``, a maximum or a comparison.

    Raises:
        UsageError: ``kind`` is neither.
    """
    if kind not in POISONS:
        raise UsageError(f"poison={kind!r} must be one of {', '.join(POISONS)}")
    with _nan_memory() if kind == "nan" else _GarbageMemory():
        yield


@contextlib.contextmanager
def _nan_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


class _GarbageMemory(TorchDispatchMode):  # type: ignore[misc] # torch is untyped here
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the local tensors
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY and not result.is_meta and type(result) is torch.Tensor:
            fill_with_garbage(result)
        return result


def fill_with_garbage(tensor: torch.Tensor) -> None:
    """Overwrite the whole storage of a tensor of any dtype, in place."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), 0, (size,))
    if tensor.dtype == torch.bool:
        whole.fill_(True)
        return
    if tensor.is_floating_point() or tensor.is_complex():
        value = min(GARBAGE, torch.finfo(tensor.dtype).max)
    else:
        value = min(GARBAGE, torch.iinfo(tensor.dtype).max)
    pattern = torch.full((size,), value, device=tensor.device)
    if tensor.dtype.is_signed:
        pattern[1::2] = -value
    whole.copy_(pattern)
