"""What the ranks of `test_warm.py` run."""

from __future__ import annotations

import gc
import linecache
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _get_python_sharding_prop_cache_info

from fsdp_testkit.backends import ddp
from fsdp_testkit.backends.rehearsal import read_sources, rehearse
from fsdp_testkit.core.case import Case
from fsdp_testkit.models import tree
from fsdp_testkit.models.build import meta_model
from fsdp_testkit.reference import readers
from fsdp_testkit.scenarios import train
from fsdp_testkit.scenarios.common import resolved


def imports(context: Any, **args: Any) -> list[str]:
    """Train, and return the modules that were imported for it."""
    before = set(sys.modules)
    train.run(context, **args)
    return sorted(set(sys.modules) - before)


def sources(context: Any, case: str) -> list[list[int]]:
    """Read sources as a load and the module tree do; return how many were known, and how many were new."""
    context.observe()
    model = meta_model(Case.from_json(case).model)
    memories = (readers._source, tree._forward_source)
    known = [memory.cache_info().currsize for memory in memories]
    read_sources(model)
    tree.module_tree(model)
    return [known, [memory.cache_info().currsize - before for memory, before in zip(memories, known, strict=True)]]


def traces(context: Any, **args: Any) -> dict[str, Any]:
    """Train, and return how often stack traces were taken, and the files that they looked at on the disk or read."""
    taken, seen = [0], set()
    extract, update, stat = traceback.StackSummary._extract_from_extended_frame_gen, linecache.updatecache, os.stat

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken[0] += 1
        return extract(*args, **kwargs)

    def noted(function: Any) -> Any:
        def call(file: Any, *args: Any) -> Any:
            seen.add(Path(file).name)
            return function(file, *args)

        return call

    traceback.StackSummary._extract_from_extended_frame_gen = counted
    linecache.updatecache = noted(update)
    linecache.os = SimpleNamespace(path=os.path, stat=noted(stat))
    train.run(context, **args)
    return {"taken": taken[0], "files": sorted(seen - {Path(__file__).name, "<string>"})}


def constructors(context: Any, case: str, checkpoint: str) -> list[Any]:
    """Run the DDP oracle; return how many constructors were known before and after, and what its model's freezes."""
    before = dict(ddp._frozen)
    train.run(context, case=case, checkpoint=checkpoint)
    _, model_class = resolved(Case.from_json(case).model)
    frozen = {name for (known, _), names in before.items() for name in names if known is model_class}
    return [len(before), len(ddp._frozen), sorted(frozen)]


def rehearsed(context: Any) -> dict[str, Any]:
    """Rehearse, and return what could have stayed."""
    context.observe()
    before, hook = torch.get_rng_state(), sys.excepthook
    done = rehearse()
    gc.collect()
    meshes = [str(item) for item in gc.get_objects() if isinstance(item, DeviceMesh)]
    return {
        "hook": sys.excepthook is hook,
        "done": done,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "group": dist.is_initialized(),
        "cached": _get_python_sharding_prop_cache_info().currsize,
        "meshes": meshes,
        "drawn": not torch.equal(before, torch.get_rng_state()),
    }


def rehearsed_in_a_group(context: Any) -> str:
    """Return the error of a rehearsal in the middle of a job."""
    context.observe()
    try:
        rehearse()
    except RuntimeError as error:
        return str(error)
    return ""


def parent(context: Any) -> int:
    """Return the process that this rank was forked from."""
    context.observe()
    return os.getppid()
