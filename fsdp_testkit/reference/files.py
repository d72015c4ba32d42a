"""Reading safetensors checkpoints: headers first, then only the rows that are asked for."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.reference.errors import LoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: the format's own bound on a header
MAX_HEADER = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: where its bytes are and what they mean."""

    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Checkpoint:
    """The tensors of a safetensors folder, by key. Opening reads headers only.

    Attributes:
        folder: the folder.
        entries: key -> `Entry`.
        problems: what is wrong with the folder as a whole (doubled keys, keys that the index promises).
        bytes_read: bytes of tensor data handed out so far.
        digest: a number that differs between folders of different headers.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder``.

        Raises:
            LoadError: no weights, an index that is malformed or points outside, or a damaged file.
        """
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.problems: list[str] = []
        self.bytes_read = 0
        self.digest = 0
        self._maps: list[mmap.mmap | None] = []
        self._paths: list[Path] = []
        self._stamps: list[tuple[int, ...]] = []
        index = _read_index(folder)
        names = sorted(set(index.values())) if index is not None else [SINGLE]
        origin: dict[str, str] = {}
        for number, name in enumerate(names):
            path = folder / name
            entries, stamp, digest = _read_header(path, number)
            self.digest = zlib.crc32(name.encode(), self.digest ^ digest)
            self._stamps.append(stamp)
            for key, entry in entries.items():
                if key in origin:
                    self.problems.append(f"doubled key {key!r}: in {origin[key]} and in {name}")
                    continue
                origin[key] = name
                self.entries[key] = entry
            self._paths.append(path)
            self._maps.append(None)
        for key, name in (index or {}).items():
            if origin.get(key) != name:
                self.problems.append(f"missing key {key!r}: the index promises it in {name}")

    def table(self) -> list[Any]:
        """Return what another process needs to know of the checkpoint without opening it: plain data."""
        return [[key, str(entry.dtype), list(entry.shape)] for key, entry in self.entries.items()]

    @classmethod
    def described(cls, folder: Path, table: list[Any]) -> Checkpoint:
        """Return a checkpoint that is known by its `table` alone: it has keys, dtypes and shapes, and no data."""
        made = cls.__new__(cls)
        made.folder, made.problems, made.bytes_read, made.digest = folder, [], 0, 0
        made.entries = {
            key: Entry(-1, getattr(torch, dtype.removeprefix("torch.")), tuple(shape), 0, 0)
            for key, dtype, shape in table
        }
        return made

    def meta(self, key: str) -> torch.Tensor:
        """Return a meta tensor of the key's dtype and shape."""
        entry = self.entries[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return rows ``[start, stop)`` of dim 0 as a private view of the file's map."""
        entry = self.entries[key]
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        shape = (stop - start, *entry.shape[1:])
        return self._window(entry, entry.start + start * row, shape)

    def full(self, key: str) -> torch.Tensor:
        """Return the whole tensor, of any number of dims, as a private view of the file's map."""
        entry = self.entries[key]
        return self._window(entry, entry.start, entry.shape)

    def _window(self, entry: Entry, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=entry.dtype)
        nbytes = count * entry.dtype.itemsize
        self.bytes_read += nbytes
        data = self._map(entry.file)
        if offset % entry.dtype.itemsize:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=offset).clone()
            return raw.view(entry.dtype).reshape(shape)
        return torch.frombuffer(data, dtype=entry.dtype, count=count, offset=offset).reshape(shape)

    def _map(self, number: int) -> mmap.mmap:
        data = self._maps[number]
        if data is None:
            path = self._paths[number]
            try:
                with path.open("rb") as file:
                    # reading a map past the end of its file ends the process: it has to be the file that was checked
                    if _stamp(file) != self._stamps[number]:
                        raise LoadError(f"{path} has changed since its header was read")
                    # private: who writes to a tensor over it writes to a copy of the page
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise LoadError(f"{path} cannot be read: {error}") from error
            self._maps[number] = data
        return data


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return key -> file name, or ``None`` for a single file."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        found = sorted(item.name for item in folder.iterdir())
        pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
        reason = f"; {', '.join(pickles[:3])} would have to be unpickled, which is not done" if pickles else ""
        raise LoadError(f"{folder} holds neither {SINGLE} nor {INDEX} nor a DCP .metadata{reason}")
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_HEADER}")
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)["weight_map"]
        items = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path} is not an index of safetensors files: {error!r}") from None
    if not items:
        raise LoadError(f"{path} names no tensor")
    for key, name in items:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise LoadError(f"{path} points outside of its folder: {key!r} -> {name!r}")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise LoadError(f"{path} names {name}, which does not exist")
    return dict(items)


def _stamp(file: Any) -> tuple[int, ...]:
    """Return what tells an open file from another one, and from what it was."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(path: Path, number: int) -> tuple[dict[str, Entry], tuple[int, ...], int]:
    """Return (entries of one file, each checked against the file's size; the file's stamp; the header's CRC)."""
    try:
        with path.open("rb") as file:
            stamp = _stamp(file)
            size = stamp[2]
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise LoadError(f"{path} is truncated or no safetensors file: header of {length} bytes in {size}")
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_no_doubles)
        header.pop("__metadata__", None)
        entries = {key: _entry(value, number, 8 + length) for key, value in header.items()}
    except LoadError:
        raise
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path} has no readable safetensors header: {error!r}") from None
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise LoadError(f"{path}: {key!r} begins at byte {entry.start}, expected {end} (gap or overlap)")
        end += entry.nbytes
    if end != size:
        raise LoadError(f"{path} is truncated or too long: its header describes {end} bytes, it has {size}")
    return entries, stamp, zlib.crc32(text)


def _entry(value: dict[str, Any], number: int, base: int) -> Entry:
    dtype = DTYPES[value["dtype"]]
    shape = tuple(value["shape"])
    start, stop = value["data_offsets"]
    if not all(type(item) is int and item >= 0 for item in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and offsets {start, stop} must be non-negative integers")
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes:
        raise ValueError(f"offsets {start, stop} do not fit shape {shape} of {value['dtype']}")
    return Entry(number, dtype, shape, base + start, nbytes)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"doubled key {doubled!r}")
    return result
