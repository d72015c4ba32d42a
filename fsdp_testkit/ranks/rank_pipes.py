"""The ends of channels and outputs that `Run` reads in its own time: what it has not taken yet waits here."""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Pipe:
    """One end; ``file`` is -1 once it is closed."""

    rank: int
    file: int
    is_channel: bool
    waiting: bytearray = field(default_factory=bytearray)
    closing: bool = False


class Pipes:
    """Writes without ever waiting, since reader and writer are the same thread.

    Args:
        selector: that tells what is ready; its keys have the `Pipe` as data.
        heard: called with the rank for each byte that comes back on a channel: all ranks have replied.
        closed: called with the rank when the reader has closed a channel.
    """

    def __init__(
        self, selector: selectors.BaseSelector, *, heard: Callable[[int], None], closed: Callable[[int], None]
    ) -> None:
        self._selector = selector
        self._heard = heard
        self._closed = closed

    def add(self, rank: int, file: int, *, is_channel: bool = False) -> Pipe:
        """Return a pipe over a copy of ``file``."""
        copy = os.dup(file)
        os.set_blocking(copy, False)
        pipe = Pipe(rank, copy, is_channel)
        self._watch(pipe)
        return pipe

    def write(self, pipe: Pipe, data: bytes) -> None:
        """Write now what there is room for, and the rest when `ready` is called."""
        pipe.waiting += data
        self._flush(pipe)

    def finish(self, pipe: Pipe) -> None:
        """Close a pipe once it is empty."""
        pipe.closing = True
        self._flush(pipe)

    def ready(self, pipe: Pipe, mask: int) -> None:
        """Do what the selector says is possible."""
        if mask & selectors.EVENT_WRITE:
            self._flush(pipe)
        else:
            self._listen(pipe)

    def shut(self, pipe: Pipe) -> None:
        """Close a pipe at once."""
        if pipe.file >= 0:
            if pipe.file in self._selector.get_map():
                self._selector.unregister(pipe.file)
            os.close(pipe.file)
            pipe.file = -1

    def _flush(self, pipe: Pipe) -> None:
        if pipe.file < 0:
            return
        try:
            while pipe.waiting:
                del pipe.waiting[: os.write(pipe.file, pipe.waiting)]
        except BlockingIOError:
            pass
        except OSError:  # closed by the reader, which has heard enough
            self._hush(pipe)
            return
        if pipe.closing and not pipe.waiting:
            self.shut(pipe)
        else:
            self._watch(pipe)

    def _watch(self, pipe: Pipe) -> None:
        events = (selectors.EVENT_READ if pipe.is_channel else 0) | (selectors.EVENT_WRITE if pipe.waiting else 0)
        known = pipe.file in self._selector.get_map()
        if events and known:
            self._selector.modify(pipe.file, events, pipe)
        elif events:
            self._selector.register(pipe.file, events, pipe)
        elif known:
            self._selector.unregister(pipe.file)

    def _listen(self, pipe: Pipe) -> None:
        try:
            data = os.read(pipe.file, 1)
        except OSError:
            data = b""
        if data:
            self._heard(pipe.rank)
        else:
            self._hush(pipe)

    def _hush(self, pipe: Pipe) -> None:
        self.shut(pipe)
        if pipe.is_channel:
            self._closed(pipe.rank)
