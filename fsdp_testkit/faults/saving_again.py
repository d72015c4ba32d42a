"""Faults of saves and restores beyond the core tests: over the loaded folder, offloaded, on other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import local
from fsdp_testkit.faults.saving import StaleWeightsSaved

SAVED_ON = 4


class MomentsLeftBehind(Fault):
    """On another number of ranks, the moments of one parameter are those of a fresh optimizer."""

    story = "one parameter's moments are not resharded"
    test = "reshard_resume"
    variant = "default"
    checks = ("restored_optimizer",)

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore, then clear one parameter's moments."""
        inner.load_training(*arguments)
        model, optimizer = arguments[:2]
        parameter = next(p for p in model.parameters() if p in optimizer.state and local(p).numel())
        if dist.get_world_size() != SAVED_ON:
            local(optimizer.state[parameter]["exp_avg"]).zero_()
            self.hit()


class MemoryOfOverwrittenFile(Fault):
    """Weights that were mapped from the file change when the file is written to."""

    story = "a save changes weights in memory"
    test = "save_over"
    variant = "default"
    checks = ("after_save",)

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Change a weight, as writing into a mapped file would."""
        del folder, layout
        with torch.no_grad():
            local(model.get_parameter("model.norm.weight")).add_(1.0)
        self.hit()


class OldFileStays(Fault):
    """The folder has a checkpoint already, and that is left there."""

    story = "a file that exists is not written"
    test = "save_over"
    variant = "default"
    checks = ("reload",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remember the files of the first load."""
        if not hasattr(self, "old"):
            self.old = {path.name: path.read_bytes() for path in Path(arguments["checkpoint"]).glob("*.safetensors*")}
        return arguments

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Put the old files back on rank 0."""
        del model, layout
        dist.barrier()
        if self.rank == 0:
            for path in folder.glob("*.safetensors*"):
                path.unlink()
            for name, content in self.old.items():
                (folder / name).write_bytes(content)
            self.hit()
        dist.barrier()


class StaleWeightsOfOffload(StaleWeightsSaved):
    """What is saved of an offloaded model are the weights as they were loaded."""

    story = "the offloaded copy is not brought up to date before a save"
    test = "offloaded_save"
    variant = "default"
