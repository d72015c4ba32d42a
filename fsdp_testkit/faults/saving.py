"""Faults in saving, and in the optimizer and training state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Rewritten


class NormDropped(Rewritten):
    """A norm's key is missing from the saved files."""

    story = "the final norm is not saved"
    checks = ("files", "ranks", "reload")

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Remove the key."""
        return tensors.pop("model.norm.weight", None) is not None


class TiedSavedTwice(Rewritten, bug="tied-alias-saved-twice"):
    """A tied weight is stored under both of its names."""

    story = "the alias of a tied weight is saved too"
    variant = "tied"

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Add the alias."""
        if "model.embed_tokens.weight" not in tensors:
            return False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        return True


class OneSliceSaved(Rewritten, bug="adapter-save-keeps-rank0-slice-only"):
    """The file holds rank 0's slice of one tensor; the rest is what was in memory."""

    story = "rank 0's slice stands for the whole tensor"
    checks = ("reload",)
    causes = ("wrong slice",)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Zero the rows of the other ranks."""
        name = "model.layers.0.self_attn.q_proj.weight"
        if name not in tensors:
            return False
        rows = -(-tensors[name].shape[0] // self.world_size)
        tensors[name][rows:] = 0
        return True


class StaleWeightsSaved(Fault):
    """What is saved are the weights as they were loaded."""

    story = "training is not in the checkpoint"
    test = "save_load"
    checks = ("reload",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Remember the weights of the first load."""
        if not hasattr(self, "first"):
            self.first = [p.to_local().detach().clone() for p in model.parameters() if isinstance(p, DTensor)]
        return model

    def before_save(self, model: nn.Module) -> nn.Module:
        """Put the old weights back while saving, and the trained ones afterwards."""
        self.trained = [p.to_local().detach().clone() for p in model.parameters() if isinstance(p, DTensor)]
        self._write(model, self.first)
        self.hit()
        return model

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Undo it."""
        del folder, layout
        self._write(model, self.trained)

    @staticmethod
    def _write(model: nn.Module, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip((p for p in model.parameters() if isinstance(p, DTensor)), values, strict=True):
                parameter.to_local().copy_(value)


class StaleOptimizer(Fault, bug="optimizer-holds-unsharded-root-params"):
    """The optimizer holds a parameter object that the model no longer has."""

    story = "one parameter of the optimizer is a copy from before sharding"
    checks = ("optimizer_binding", "movement")
    causes = ("optimizer on other tensors",)

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replace one parameter of the first group by a detached copy."""
        del model
        group = optimizer.param_groups[0]["params"]
        group[-1] = nn.Parameter(group[-1].detach().clone())
        self.hit()


class OptimizerNotRestored(Fault, bug="moments-never-loaded-lazy-state"):
    """Moments start from zero after a resume."""

    story = "the optimizer's state is not restored"
    test = "resume"
    variant = "default"
    checks = ("restored_optimizer", "resumed_weights")
    causes = ("state not restored",)

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore, then forget the optimizer's state."""
        inner.load_training(*arguments)
        arguments[1].state.clear()
        self.hit()


class RngNotRestored(Fault):
    """Dropout masks after a resume are not those of the uninterrupted run."""

    story = "the random state is not restored"
    test = "resume"
    variant = "default"
    checks = ("resumed_rng",)
    model = "gpt2"

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore everything else."""
        state = torch.get_rng_state()
        inner.load_training(*arguments)
        torch.set_rng_state(state)
        self.hit()


class SchedulerNotRestored(Fault, bug="lr-not-loaded"):
    """The learning-rate schedule starts again."""

    story = "the scheduler's state is not restored"
    test = "resume"
    variant = "default"
    checks = ("resumed_lrs",)
    causes = ("state not restored",)

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Put the scheduler and the learning rates back to their start."""
        _, optimizer, scheduler, _ = arguments
        before = scheduler.state_dict()
        rates = [group["lr"] for group in optimizer.param_groups]
        inner.load_training(*arguments)
        scheduler.load_state_dict(before)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.hit()
