"""What a piece of code sends between ranks, seen from one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Namespaces of operators that exchange tensors between ranks.
COLLECTIVES = ("c10d", "_c10d_functional")
#: Words in the names of those that move data; the others wait for it or wrap it.
_EXCHANGES = ("gather", "scatter", "reduce", "broadcast", "alltoall", "all_to_all", "send", "recv")


class Traffic(TorchDispatchMode):  # type: ignore[misc] # torch is untyped here
    """Counts operators that exchange tensors between ranks, also those inside of operators on DTensors.

    Attributes:
        calls: operator -> number of calls.
        received: bytes of the tensors that they gave back to this rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes it apart, and its collectives come here
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in COLLECTIVES and any(word in name for word in _EXCHANGES):
            self.calls[name] += 1
            self.received += sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(result))
        return result


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
