"""How many bytes a process reads, whichever way: by system calls, or out of mapped files.

System calls are counted by the kernel (``rchar`` of ``/proc/self/io``). What is taken out of a mapped file passes no
system call, so the two ways into a map are counted where they hand out data: slices and tensors of
``safetensors.safe_open``, and ``torch.frombuffer`` over an ``mmap``.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch


class BytesRead:
    """Bytes read so far: by system calls (``calls``), out of maps (``mapped``)."""

    def __init__(self) -> None:
        self.mapped = 0
        self._began = _rchar()
        self._ended: int | None = None

    @property
    def calls(self) -> int:
        """Bytes that ``read`` and its kin returned."""
        return (_rchar() if self._ended is None else self._ended) - self._began

    def stop(self) -> None:
        """Count no further system calls."""
        self._ended = _rchar()


@contextlib.contextmanager
def counting_reads() -> Iterator[BytesRead]:
    """Count what this process reads. Readers of files have to be opened inside the block."""
    counter = BytesRead()
    original = safetensors.safe_open

    def opened(*args: Any, **kwargs: Any) -> Any:
        return _File(original(*args, **kwargs), counter)

    plain = torch.frombuffer

    def frombuffer(buffer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = plain(buffer, *args, **kwargs)
        if isinstance(buffer, _Map) and buffer.of_file:
            counter.mapped += tensor.nbytes
        return tensor

    places = find_readers()
    for module in places:
        setattr(module, _NAME, opened)
    torch.frombuffer, plain_map, mmap.mmap = frombuffer, mmap.mmap, _Map  # type: ignore[misc]  # a counting subclass
    try:
        yield counter
    finally:
        counter.stop()
        torch.frombuffer, mmap.mmap = plain, plain_map  # type: ignore[misc]
        for module in places:
            setattr(module, _NAME, original)


#: Modules that hold ``safetensors.safe_open`` under its own name, and the last module that was looked at.
_readers: list[Any] = []
_last = ""
_NAME = safetensors.safe_open.__name__


def find_readers() -> list[Any]:
    """Return the modules that hold ``safe_open``.

    Called where ranks are forked from, it spares them the look at thousands of modules, which would copy as many pages
    of the memory that they share; they look at what was imported since. For the same reason it goes by the name alone,
    not by every global of a module.
    """
    global _last
    new = list(itertools.takewhile(lambda name: name != _last, reversed(sys.modules)))
    found = [*_readers, *(sys.modules[name] for name in new)]
    holders = [module for module in found if getattr(module, "__dict__", {}).get(_NAME) is safetensors.safe_open]
    _readers[:] = dict.fromkeys(holders)
    if new:
        _last = new[0]
    return list(_readers)


class _Map(mmap.mmap):
    """A map that knows whether it is one of a file; others are memory."""

    of_file = False

    def __new__(cls, fileno: int, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls, fileno, *args, **kwargs)
        made.of_file = fileno != -1
        return made


class _File:
    """A ``safe_open`` handle whose tensors are counted when they are taken."""

    def __init__(self, handle: Any, counter: BytesRead) -> None:
        self._handle = handle
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> _File:
        self._handle.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._handle.__exit__(*exc)

    def get_tensor(self, name: str) -> Any:
        """Return and count a whole tensor."""
        tensor = self._handle.get_tensor(name)
        self._counter.mapped += tensor.nbytes
        return tensor

    def get_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return and count several tensors, or all."""
        tensors = self._handle.get_tensors(*args, **kwargs)
        self._counter.mapped += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def get_slice(self, name: str) -> Any:
        """Return a slice that counts what is taken out of it."""
        return _Slice(self._handle.get_slice(name), self._counter)


class _Slice:
    """A safetensors slice whose tensors are counted when they are taken."""

    def __init__(self, inner: Any, counter: BytesRead) -> None:
        self._inner = inner
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> Any:
        tensor = self._inner[index]
        self._counter.mapped += tensor.nbytes
        return tensor


def _rchar() -> int:
    text = Path("/proc/self/io").read_text()
    # this file's own text is part of what the next look counts
    return int(text.split("rchar:")[1].split()[0])
