"""A reference meta-init loader and saver for sharded models; usable alone, without the rest of the kit.

model = load_sharded(folder, mesh)                  # every rank reads its own slices
save_sharded(model, folder)                         # standard safetensors, or layout="dcp"
save_training(model, optimizer, scheduler, folder)  # optimizer, scheduler, RNG of every rank
load_training(model, optimizer, scheduler, folder)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsdp_testkit.reference.errors import (
        BindError,
        LoadError,
        PlanError,
        SaveError,
        SwitchError,
        TrainingStateError,
    )
    from fsdp_testkit.reference.load import load_sharded
    from fsdp_testkit.reference.optimizers import bind_optimizer
    from fsdp_testkit.reference.plan import ModuleOptions, Plan
    from fsdp_testkit.reference.save import save_sharded
    from fsdp_testkit.reference.switches import efficient_loading, switched
    from fsdp_testkit.reference.training import load_training, save_training

__all__ = [
    "BindError",
    "LoadError",
    "ModuleOptions",
    "Plan",
    "PlanError",
    "SaveError",
    "SwitchError",
    "TrainingStateError",
    "bind_optimizer",
    "efficient_loading",
    "load_sharded",
    "load_training",
    "save_sharded",
    "save_training",
    "switched",
]

_HOMES = {
    "BindError": "errors",
    "LoadError": "errors",
    "ModuleOptions": "plan",
    "Plan": "plan",
    "PlanError": "errors",
    "SaveError": "errors",
    "SwitchError": "errors",
    "TrainingStateError": "errors",
    "bind_optimizer": "optimizers",
    "efficient_loading": "switches",
    "load_sharded": "load",
    "load_training": "training",
    "save_sharded": "save",
    "save_training": "training",
    "switched": "switches",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
