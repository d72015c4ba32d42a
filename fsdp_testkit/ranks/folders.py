"""The folder of a harness: it goes with its owner, and what a killed one left goes when the next one starts.

A folder belongs to the process that holds a lock on it. The kernel drops the lock with the process, however that ends,
so a folder that can be locked has no owner. Sessions side by side hold theirs, and leave each other alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "fsdp_testkit-"
#: Seconds that a folder is left alone: somebody may have made it and not locked it yet.
YOUNG = 60.0


class OwnFolder:
    """A temporary folder that belongs to this process.

    Args:
        parent: where it is made; the system's place for temporary files where ``None``.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = hold(self.path)

    def release(self) -> None:
        """Give up the ownership; the folder stays, as far as it is still there."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_orphans(parent: Path, young: float = YOUNG) -> int:
    """Delete the folders in ``parent`` whose owners have ended; return how many.

    Args:
        parent: where harnesses make their folders.
        young: seconds since its last change for which a folder is left alone.
    """
    count = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            with contextlib.suppress(OSError):  # others tidy up as well
                known = entry.stat(follow_symlinks=False)
                mine = entry.is_dir(follow_symlinks=False) and known.st_uid == os.getuid()
                if not (mine and entry.name.startswith(PREFIX)) or time.time() < known.st_mtime + young:
                    continue
                if (lock := hold(Path(entry.path))) >= 0:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)
                    count += 1
    return count


def hold(path: Path) -> int:
    """Own a folder until this process ends or the returned file is closed.

    Returns:
        a file descriptor that holds the lock, -1 where somebody else has it or locks are not to be had.

    Raises:
        OSError: the folder cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return -1
    return file
