"""What a file system is asked for beyond reading and writing: to be sure, and to exchange two names at once."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

#: linux/fs.h and linux/fcntl.h; see https://man7.org/linux/man-pages/man2/rename.2.html
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NOT_POSSIBLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}


def sync(path: Path) -> None:
    """Return once the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool) -> None:
    """Write a small file, and wait for the disk if ``durable``."""
    path.write_text(text, encoding="utf-8")
    if durable:
        sync(path)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders change names, at once for every reader; return whether the system can do that."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_POSSIBLE:
        return False
    raise OSError(number, os.strerror(number), str(first))


def lock(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock as long as it is open, ``None`` if somebody holds it.

    A process that dies lets go of its locks. Where the file system knows no locks on folders, each is granted.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def same_folder(path: Path, descriptor: int) -> bool:
    """Return whether ``path`` still names the folder that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def link_into(folder: Path, other: Path, wanted: Callable[[Path], bool], *, durable: bool) -> None:
    """Give the wanted items of ``folder`` a second name in ``other``, unless that has one like it.

    Files are linked rather than copied: it costs no space, and who writes to one later writes to both. They are
    copied where the file system does not link. Symbolic links stay what they are.
    """
    for item in sorted(folder.iterdir()):
        if not wanted(item) or os.path.lexists(other / item.name):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, other / item.name, symlinks=True, copy_function=_link)
            for inside in (other / item.name).rglob("*") if durable else ():
                if inside.is_dir() and not inside.is_symlink():
                    sync(inside)
            if durable:
                sync(other / item.name)
        else:
            _link(item, other / item.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            sync(Path(target))
