"""Several scenarios, one after the other, in the same ranks: starting ranks costs as much as a short scenario."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.backends.groups import forget_groups
from fsdp_testkit.core.case import Case
from fsdp_testkit.scenarios import kept

#: The scenario that goes on with a model which another part has trained.
SAVE = "fsdp_testkit.scenarios.saving:save"


def run(context: Any, *, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Run each part as if it were alone; what a finished one replied lies in ``part<index>/reply.<rank>.json``.

    A part holds ``target`` and ``args``, as a job does, and ``ranks``, the size of its world. Worlds get smaller, and
    a rank that is part of none of those left is done.

    Raises:
        RuntimeError: a part returned without an observation.
    """
    kept.expect([Case.from_json(part["args"]["case"]) for part in parts if part["target"] == SAVE])
    judging = [is_ddp(part) for part in parts]
    world: Any = context
    for index, part in enumerate(parts):
        if part["ranks"] != world.world_size:
            world = world.regroup(part["ranks"])
            forget_groups()
            if world is None:
                break
        if index and judging[index - 1] and not judging[index]:
            give_back_memory()  # DDP's full copies are not to be held against the code under test
        folder = part_folder(context.folder, index)
        folder.mkdir(exist_ok=True)
        mine = replace(world, folder=folder, observations=0)
        module, _, name = part["target"].partition(":")
        with unchanged_process():
            value = getattr(importlib.import_module(module), name)(mine, **part["args"])
        if mine.observations < 1:
            raise RuntimeError(f"{part['target']} returned without an observation")
        context.observe(mine.observations)
        finished = reply_file(folder, context.rank)
        partial = finished.with_suffix(".partial")
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.rename(finished)
    return {}


def is_ddp(part: dict[str, Any]) -> bool:
    """Return whether a part runs the DDP oracle."""
    case = part["args"].get("case", "")
    return bool(case) and Case.from_json(case).backend == "ddp"


def give_back_memory() -> None:
    """Free what earlier parts have left in cycles and, on a GPU, what its allocator keeps."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def part_folder(folder: Path, index: int) -> Path:
    """Return the folder of a part within the job's."""
    return folder / f"part{index}"


def reply_file(folder: Path, rank: int) -> Path:
    """Return where ``rank`` says what a part returned."""
    return folder / f"reply.{rank}.json"


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Undo what a part changed in the process: environment, ``sys.path``, folder, torch's global settings."""
    environment, path, folder = dict(os.environ), list(sys.path), Path.cwd()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.path[:] = path
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_rng_state(random_state)
