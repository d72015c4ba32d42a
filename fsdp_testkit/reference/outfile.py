"""Writing safetensors files in parts: the header says where each tensor lies, so any process can fill any rows.

The format: 8 bytes header length (little endian), JSON header padded by spaces, data without gaps.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from fsdp_testkit.reference.errors import SaveError
from fsdp_testkit.reference.files import DTYPES

#: Wider dtypes come first, so that every tensor is aligned; within a width as the safetensors library has it.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: a header of another length would leave the data unaligned
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor of a file is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of dim 0; all of them without dims."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


@dataclass(frozen=True, slots=True)
class Frame:
    """A file before its data: its first bytes, its size in bytes, and where each tensor begins."""

    header: bytes
    size: int
    starts: dict[str, int]


def frame(tensors: Mapping[str, Spec]) -> Frame:
    """Lay out a file in the order of the safetensors library: by dtype, then by name.

    Raises:
        SaveError: a dtype is none of the format's.
    """
    for key, spec in tensors.items():
        if spec.dtype not in _NAMES:
            raise SaveError(f"{key!r} has dtype {spec.dtype}, which safetensors does not know")
    rank = {name: index for index, name in enumerate(_ORDER)}
    ordered = sorted(tensors, key=lambda key: (rank[_NAMES[tensors[key].dtype]], key))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for key in ordered:
        spec = tensors[key]
        starts[key], start, end = end, end, end + spec.nbytes
        entries[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    base = 8 + len(text)
    return Frame(struct.pack("<Q", len(text)) + text, base + end, {key: base + start for key, start in starts.items()})


class OutFile:
    """A file that several processes fill at the same time, each its own parts of it."""

    def __init__(self, path: Path) -> None:
        # who comes first creates it; nobody truncates
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)

    def __enter__(self) -> OutFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def begin(self, framed: Frame) -> None:
        """Write the header and give the file its size. One process does this, at any time."""
        self._write(memoryview(framed.header), 0)
        # longer, never shorter: parts that are there stay
        os.ftruncate(self._descriptor, framed.size)

    def put(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a tensor's bytes at ``offset``. On the CPU and contiguous, nothing is copied."""
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._write(memoryview(data.numpy()), offset)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            # a call may write less: Linux stops at 2 GiB, a full disk where it is full
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
