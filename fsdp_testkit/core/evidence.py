"""What one rank saw: JSON facts and named tensors as raw bytes with dtype and shape.

File format: 8 bytes little-endian length of the header, the header (UTF-8 JSON with ``facts`` and
``tensors``: name -> [dtype, shape, offset, bytes]), then the data. Tensors are memory-mapped on reading.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdp_testkit.core.errors import InternalError

#: torch dtype name -> numpy dtype that holds its bytes. numpy has no bfloat16 or float8.
_NUMPY: dict[str, str] = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
    "complex64": "<c8",
    "complex128": "<c16",
}
Array = npt.NDArray[Any]
#: Bytes that are written at once: evidence has hundreds of small tensors.
BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor as bytes: ``dtype`` is torch's name without the ``torch.`` prefix."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def bits(self) -> Array:
        """Return the raw elements, bfloat16 as ``uint16``; use it for bit-exact comparison."""
        if self.dtype not in _NUMPY:
            raise InternalError(f"dtype {self.dtype!r} cannot travel in evidence; known: {sorted(_NUMPY)}")
        return np.frombuffer(self.data, dtype=_NUMPY[self.dtype]).reshape(self.shape)

    def array(self) -> Array:
        """Return the values; bfloat16 is widened to float32 exactly."""
        raw = self.bits()
        if self.dtype == "bfloat16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class Evidence:
    """Facts and tensors that one rank reports.

    Attributes:
        rank: global rank.
        facts: plain JSON data.
        tensors: name -> `TensorData`; names look like ``grad/3/model.norm.weight``.
    """

    rank: int
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorData] = field(default_factory=dict)

    def under(self, prefix: str) -> Iterator[tuple[str, TensorData]]:
        """Yield (rest of the name, tensor) for tensors whose name starts with ``prefix``."""
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                yield name[len(prefix) :], tensor

    def write(self, path: Path) -> None:
        """Write the file in one go."""
        offset = 0
        table: dict[str, list[Any]] = {}
        for name, tensor in self.tensors.items():
            size = len(tensor.data)
            table[name] = [tensor.dtype, list(tensor.shape), offset, size]
            offset += size
        header = json.dumps({"rank": self.rank, "facts": self.facts, "tensors": table}).encode()
        with path.open("wb", buffering=BUFFER) as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            file.writelines(tensor.data for tensor in self.tensors.values())

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """Read a file written by `write`.

        Raises:
            InternalError: the file is shorter than its header says.
        """
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        (length,) = struct.unpack("<Q", view[:8])
        header = json.loads(bytes(view[8 : 8 + length]))
        start = 8 + length
        tensors = {}
        for name, (dtype, shape, offset, size) in header["tensors"].items():
            if start + offset + size > len(view):
                raise InternalError(f"evidence {path} is truncated at {name}")
            tensors[name] = TensorData(dtype, tuple(shape), view[start + offset : start + offset + size])
        return cls(rank=header["rank"], facts=header["facts"], tensors=tensors)
