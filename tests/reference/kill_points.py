"""Killing a process at its k-th step of writing below a folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fsdp_testkit.reference import disk

EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


class Killer:
    """Counts what this process does to files below ``base``; at step ``at`` it is gone.

    Whatever goes through Python's audit events is a step, and so are the writes and syncs of the saver itself.
    """

    def __init__(self, base: Path, at: int) -> None:
        self.base = str(base)
        self.at = at
        self.steps = 0
        sys.addaudithook(self.audit)
        self.wrap(os, "pwrite", self.half)
        self.wrap(os, "fsync", self.step)
        self.wrap(disk, "exchange", self.step)

    def step(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
            return
        writes = event != "open" or (len(arguments) == 3 and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes and os.fspath(arguments[0]).startswith(self.base):
            self.step()

    def half(self, descriptor: int, data: Any, offset: int) -> None:
        if self.steps + 1 == self.at:
            self.real_pwrite(descriptor, data[: len(data) // 2], offset)
        self.step()

    def wrap(self, module: Any, name: str, before: Any) -> None:
        real = getattr(module, name)
        setattr(self, f"real_{name}", real)

        def wrapped(*arguments: Any) -> Any:
            before(*arguments)
            return real(*arguments)

        setattr(module, name, wrapped)
