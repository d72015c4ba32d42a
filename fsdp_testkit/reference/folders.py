"""Folders that appear whole or not at all, written by several ranks.

A save goes to a hidden folder beside the target, which then takes the target's name. A process that is killed
leaves the target as it was, or as it should be, and perhaps a hidden folder that the next save removes: it
knows by a lock, which dies with its holder, whether somebody still writes there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from fsdp_testkit.reference import disk
from fsdp_testkit.reference.errors import ReferenceLoaderError, SaveError

T = TypeVar("T")

TRAINING = "training"
TRAINING_STATE = "training.json"
#: what a checkpoint consists of; anything else in a folder is somebody else's and kept
OWN = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|.*\.distcp|\.metadata"
    rf"|config\.json|generation_config\.json|\.{TRAINING}\.(saving|previous)-[0-9a-f]{{16}})"
)


def foreign(path: Path) -> bool:
    """Return whether an item of a checkpoint's folder is no part of the checkpoint."""
    if path.name == TRAINING:
        return not (path / TRAINING_STATE).is_file()
    return OWN.fullmatch(path.name) is None


def distributed() -> bool:
    """Return whether a process group is there to communicate over."""
    return bool(dist.is_available() and dist.is_initialized())


def rank() -> int:
    """Return this process's global rank."""
    return int(dist.get_rank()) if distributed() else 0


def world() -> int:
    """Return the number of processes."""
    return int(dist.get_world_size()) if distributed() else 1


def agree(error: BaseException | None, kind: type[ReferenceLoaderError] = SaveError, value: Any = None) -> Any:
    """Return rank 0's ``value``, or raise on every rank if any rank has an error. Collective.

    Raises:
        ReferenceLoaderError: this rank's own; else of ``kind``, with the first failing rank's text.
    """
    text = None if error is None else f"{type(error).__name__}: {error}"
    found: list[tuple[str | None, Any]] = [(text, value)]
    if distributed():
        found = [(None, None)] * world()
        dist.all_gather_object(found, (text, value if rank() == 0 else None))
    for failing, (text, _) in enumerate(found):
        if text is not None:
            if isinstance(error, ReferenceLoaderError):
                raise error
            raise kind(f"rank {failing}: {text}") from error
    return found[0][1]


def agreed(function: Callable[..., T], *arguments: Any) -> T:
    """Return ``function(*arguments)``, or raise on every rank if it raises on any. Collective.

    Inside `replaced`, whatever may fail on one rank alone and is followed by a collective goes through this: ranks
    that fail and ranks that do not have to come to the same collectives.
    """
    problem: Exception | None = None
    result: T | None = None
    try:
        result = function(*arguments)
    except Exception as error:
        problem = error
    agree(problem)
    return cast("T", result)


@contextmanager
def replaced(target: Path, keep: Callable[[Path], bool] = foreign, *, durable: bool = True) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that takes its place when the block ends well. Collective.

    With ``durable``, the block has to see to it that the bytes of its files are on the disk.

    Args:
        target: the folder to write; its parents are made. A symbolic link stays, and what it names is replaced.
        keep: which items of an older folder the new one keeps.
        durable: do not return before the names are on the disk.

    Raises:
        SaveError: ``target`` is a file or a mount point, or not all ranks see the same file system; or the
            block, or taking the place, failed on any rank.
    """
    place: _Place | None = None
    problem: BaseException | None = None
    try:
        place = _Place(target) if rank() == 0 else None
    except Exception as error:
        problem = error
    partial = agree(problem, value=None if place is None else place.partial)
    try:
        try:
            if not partial.is_dir():
                raise SaveError(f"{partial} was made by rank 0, and rank {rank()} does not see it")
            yield partial
        except Exception as error:
            problem = error
        try:
            agree(problem)
            if place is not None:
                place.take(keep, durable=durable)
        except Exception as error:
            problem = error
        if place is not None:
            place.close()  # nobody leaves before it is tidy
        agree(problem)
    finally:
        if place is not None:
            place.close()


class _Place:
    """The hidden folder of one save, locked. Rank 0 has it."""

    def __init__(self, target: Path) -> None:
        if target.exists() and not target.is_dir():
            raise SaveError(f"folder={str(target)!r} is a file")
        self.target = target.resolve()
        if self.target.is_mount():
            raise SaveError(f"folder={str(target)!r} is a mount point, which nothing can take the place of")
        self.parent = self.target.parent
        self.parent.mkdir(parents=True, exist_ok=True)
        self._clear()
        while True:
            self.partial = self._beside("saving")
            self.partial.mkdir()
            descriptor = disk.lock(self.partial)
            # somebody who clears up may have come between the two
            if descriptor is not None and disk.same_folder(self.partial, descriptor):
                break
            if descriptor is not None:
                os.close(descriptor)
        self._lock: int | None = descriptor
        self.taken = False

    def take(self, keep: Callable[[Path], bool], *, durable: bool) -> None:
        """Give the new folder the target's name, and delete the old one."""
        replaces = self.target.is_dir()
        if replaces:
            shutil.copymode(self.target, self.partial)
            disk.link_into(self.target, self.partial, keep, durable=durable)
        if durable:
            disk.sync(self.partial)
        old = self.partial
        if not replaces:
            self.partial.rename(self.target)
        elif not disk.exchange(self.partial, self.target):
            # not at once: a crash between the two is mended by the next save
            old = self._beside("previous")
            self.target.rename(old)
            self.partial.rename(self.target)
        self.taken = True
        if durable:
            # before anything of the old folder goes
            disk.sync(self.parent)
        if replaces:
            # what came into the old folder meanwhile
            disk.link_into(old, self.target, keep, durable=durable)
            shutil.rmtree(old)

    def close(self) -> None:
        """Let go of the lock; delete the new folder if it did not take the target's place."""
        if self._lock is None:
            return
        if not self.taken:
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _beside(self, kind: str) -> Path:
        return self.parent / f".{self.target.name}.{kind}-{secrets.token_hex(8)}"

    def _clear(self) -> None:
        """Mend and remove what saves to the same target left behind when they were killed."""
        own = re.compile(rf"\.{re.escape(self.target.name)}\.(saving|previous)-[0-9a-f]{{16}}")
        left = sorted(item for item in self.parent.iterdir() if own.fullmatch(item.name))
        previous = [item for item in left if ".previous-" in item.name]
        if previous and not self.target.exists():
            previous[0].rename(self.target)
        for item in left:
            with suppress(FileNotFoundError):
                descriptor = disk.lock(item)
                if descriptor is not None:
                    shutil.rmtree(item, ignore_errors=True)
                    os.close(descriptor)
