"""Folders that appear whole or not at all, written by several ranks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from fsdp_testkit.reference.errors import ReferenceLoaderError, SaveError

TRAINING = "training"
#: what a checkpoint consists of; anything else in a folder is somebody else's and kept
OWN = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|.*\.distcp|\.metadata"
    rf"|config\.json|generation_config\.json|{TRAINING})"
)


def distributed() -> bool:
    """Return whether a process group is there to communicate over."""
    return bool(dist.is_available() and dist.is_initialized())


def rank() -> int:
    """Return this process's global rank."""
    return int(dist.get_rank()) if distributed() else 0


def world() -> int:
    """Return the number of processes."""
    return int(dist.get_world_size()) if distributed() else 1


def agree(error: BaseException | None, kind: type[ReferenceLoaderError] = SaveError) -> None:
    """Raise on every rank if any rank has an error. Collective.

    Raises:
        ReferenceLoaderError: of ``kind``, with the first failing rank's text; on that rank from ``error``.
    """
    text = None if error is None else f"{type(error).__name__}: {error}"
    texts: list[str | None] = [text]
    if distributed():
        texts = [None] * world()
        dist.all_gather_object(texts, text)
    for failing, found in enumerate(texts):
        if found is not None:
            if isinstance(error, kind):
                raise error
            raise kind(f"rank {failing}: {found}") from error


@contextmanager
def replaced(target: Path, keep: Callable[[str], bool] = lambda name: not OWN.fullmatch(name)) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that takes its place when the block ends well. Collective.

    Args:
        target: the folder to write; its parents are made.
        keep: names of an older folder's items that move into the new one.

    Raises:
        SaveError: ``target`` is a file; or the block, or the swap, failed on any rank.
    """
    # the name is the same on all ranks without a message; a leftover of a crash is cleared
    partial = target.parent / f".{target.name}.partial"
    problem: BaseException | None = None
    try:
        if target.exists() and not target.is_dir():
            raise SaveError(f"folder={str(target)!r} is a file")
        if rank() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
    except Exception as error:
        problem = error
    agree(problem)
    try:
        yield partial
    except Exception as error:
        problem = error
    try:
        agree(problem)
        if rank() == 0:
            _swap(partial, target, keep)
    except Exception as error:
        problem = error
    if rank() == 0 and partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
    agree(problem)


def _swap(partial: Path, target: Path, keep: Callable[[str], bool]) -> None:
    if not target.exists():
        partial.rename(target)
        return
    for item in target.iterdir():
        if keep(item.name) and not (partial / item.name).exists():
            if item.is_dir():
                shutil.copytree(item, partial / item.name, symlinks=True)
            else:
                shutil.copy2(item, partial / item.name, follow_symlinks=False)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)
