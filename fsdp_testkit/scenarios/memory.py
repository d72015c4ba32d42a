"""How much memory a process holds over time: anonymous and shared pages, mapped files apart.

The kernel counts resident pages by kind (``RssAnon``, ``RssFile``, ``RssShmem`` of ``/proc/self/status``,
https://docs.kernel.org/filesystems/proc.html). A thread samples them, so that a peak inside an operator, in a
library's own allocator or in another thread is seen as well. Pages of a mapped checkpoint belong to the page cache
and are counted apart; once written to, a private mapping's page is anonymous.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

STATUS = "/proc/self/status"
_KINDS = re.compile(rb"Rss(Anon|File|Shmem):\s+(\d+) kB")


def resident() -> dict[str, int]:
    """Return the bytes of resident pages: ``Anon``, ``File`` and ``Shmem``."""
    with open(STATUS, "rb") as file:  # noqa: PTH123 (a plain open is what the sampler's rate allows)
        return _parse(file.read())


def _parse(text: bytes) -> dict[str, int]:
    return {kind.decode(): int(value) * 1024 for kind, value in _KINDS.findall(text)}


class MemorySampler:
    """Samples this process's memory from a thread while the ``with`` block runs.

    Args:
        period: seconds between two samples.

    Attributes:
        points: (seconds since the start, anonymous plus shared bytes above the start, mapped bytes above the start).
        own_reads: bytes that the sampler itself has read from ``/proc``.
    """

    def __init__(self, period: float = 0.002) -> None:
        self.period = period
        self.points: list[tuple[float, int, int]] = []
        self.own_reads = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._file = os.open(STATUS, os.O_RDONLY)
        self._began = time.perf_counter()
        self._base = self._read()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        os.close(self._file)

    @property
    def peak(self) -> int:
        """Largest anonymous plus shared bytes above the start."""
        return max((held for _, held, _ in self.points), default=0)

    @property
    def end(self) -> int:
        """Anonymous plus shared bytes above the start, at the end."""
        return self.points[-1][1] if self.points else 0

    def timeline(self, most: int = 100) -> list[list[float]]:
        """Return at most ``most`` points as [ms, KiB held, KiB mapped]; of each stretch the point of its peak."""
        size = max(1, -(-len(self.points) // most))
        stretches = [self.points[index : index + size] for index in range(0, len(self.points), size)]
        peaks = [max(stretch, key=lambda point: point[1]) for stretch in stretches]
        return [[round(seconds * 1e3, 1), held // 1024, mapped // 1024] for seconds, held, mapped in peaks]

    def facts(self, most: int = 100) -> dict[str, Any]:
        """Return peak, end (bytes) and timeline as plain data."""
        return {"peak": self.peak, "end": self.end, "samples": len(self.points), "timeline": self.timeline(most)}

    def _loop(self) -> None:
        while not self._stop.wait(self.period):
            self._sample()

    def _sample(self) -> None:
        held, mapped = self._read()
        seconds = time.perf_counter() - self._began
        self.points.append((seconds, held - self._base[0], mapped - self._base[1]))

    def _read(self) -> tuple[int, int]:
        text = os.pread(self._file, 8192, 0)
        self.own_reads += len(text)
        kinds = _parse(text)
        return kinds["Anon"] + kinds["Shmem"], kinds["File"]


def stray_bytes(model: nn.Module) -> int:
    """Return the bytes of all live tensors in memory that are no part of ``model``: its parameters and buffers."""
    own: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        own.add(_storage(tensor.to_local() if isinstance(tensor, DTensor) else tensor))
    found: dict[int, int] = {}
    gc.collect()
    for item in gc.get_objects():
        # exact types: wrappers have no memory of their own
        if type(item) in (torch.Tensor, nn.Parameter) and item.device.type != "meta":
            found[_storage(item)] = item.untyped_storage().nbytes()
    return sum(size for storage, size in found.items() if storage not in own)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
