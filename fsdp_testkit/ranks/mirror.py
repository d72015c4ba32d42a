"""A folder that is the same on two machines without a shared file system: what has changed travels as bytes.

The path is the same on both, so that a job's arguments and replies may name files in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_testkit.ranks.wire import DATA_LIMIT, WireError

#: Bytes that may travel for one job, in each direction. More belongs into a folder that the machines share.
TRAVEL_LIMIT = 1 << 30
#: Its text, chosen by pytest, is how an agent finds out that the folder is shared.
TOKEN = ".fsdp_testkit-token"
#: Begins the names of entries that stay where they are.
STAYS = ".host-"

Send = Callable[[dict[str, Any], bytes], None]
_Mark = tuple[int, int, int]


class TooLargeError(Exception):
    """More has changed than may travel; the message says how much."""


@dataclass(slots=True)
class Mirror:
    """One side of the folder.

    Attributes:
        root: the folder.
        known: what the other side has, by relative path: size, time of change and inode; ``None`` for a folder.
    """

    root: Path
    known: dict[str, _Mark | None] = field(default_factory=dict)

    def send_changes(self, send: Send, limit: int = TRAVEL_LIMIT) -> int:
        """Send what the other side lacks; return the number of bytes.

        Raises:
            TooLargeError: nothing was sent.
            WireError: the other side is gone.
        """
        now = dict(self._scan())
        changed = [name for name, mark in now.items() if name not in self.known or self.known[name] != mark]
        size = sum(mark[0] for name in changed if (mark := now[name]) is not None)
        if size > limit:
            raise TooLargeError(
                f"{size / 2**20:.1f} MiB of new files in {self.root}, of which {limit / 2**20:.1f} MiB may travel: "
                "put TMPDIR on a folder that all machines share"
            )
        for name in [name for name in self.known if name not in now]:
            send({"gone": name}, b"")
        for name in changed:
            if now[name] is None:
                send({"made": name}, b"")
            else:
                self._send_file(send, name)
        self.known = now
        return size

    def take(self, message: dict[str, Any], data: bytes) -> None:
        """Do to this side what the other side has sent.

        Raises:
            WireError: a path that leaves the folder.
            OSError: it cannot be done here.
        """
        name = str(next(message[kind] for kind in ("gone", "made", "file") if kind in message))
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise WireError(f"it named {name!r}, which is no path inside the folder")
        path = self.root / name
        if "gone" in message:
            self.known.pop(name, None)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        if "made" in message:
            path.mkdir(parents=True, exist_ok=True)
            self.known[name] = None
            return
        begin = message.get("at") == 0
        if begin:
            path.unlink(missing_ok=True)  # a mapping of the old file stays whole
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if begin else 0)
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
        if message.get("last"):
            self.known[name] = _mark(path.lstat())

    def _send_file(self, send: Send, name: str) -> None:
        at = 0
        with contextlib.suppress(FileNotFoundError), (self.root / name).open("rb") as file:
            while True:
                data = file.read(DATA_LIMIT)
                last = len(data) < DATA_LIMIT
                send({"file": name, "at": at, "last": last}, data)
                at += len(data)
                if last:
                    return

    def _scan(self, folder: str = "") -> Iterator[tuple[str, _Mark | None]]:
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError:  # deleted meanwhile
            return
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.name.startswith(STAYS) or name == TOKEN:
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    yield name, None
                    yield from self._scan(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    yield name, _mark(entry.stat(follow_symlinks=False))


def _mark(status: os.stat_result) -> _Mark:
    assert stat.S_ISREG(status.st_mode)
    return status.st_size, status.st_mtime_ns, status.st_ino
