"""Museum: loads that allocate or initialise what the rank does not keep, and switches that nobody reads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import local

TIED = "gemma"  # tied by default


class _Memory(Fault):
    """Allocates in vain during a load."""

    test = "meta_init"
    variant = "default"
    checks = ("meta_init",)
    causes: ClassVar[tuple[str, ...]] = ("memory held",)

    def full(self, arguments: dict[str, Any]) -> nn.Module:
        """Build the whole model, with random weights, on this rank."""
        config = arguments["model_class"].config_class.from_pretrained(str(arguments["checkpoint"]))
        model: nn.Module = arguments["model_class"](config)
        self.hit()
        return model


class InitOffRank0(_Memory, bug="nonzero-rank-reinit"):
    """The ranks that will receive the weights initialise a model first."""

    story = "what is about to be overwritten is drawn at random first, on all ranks but the first"
    blamed = 1

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build a model off rank 0."""
        if self.rank:
            self.full(arguments)
        return arguments


class WholeFileEverywhere(_Memory, bug="env-switch-not-wired"):
    """The memory-saving switch never reaches its readers: every rank reads the whole checkpoint."""

    story = "the switch is set in the config and never exported, so every rank reads everything"
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Read all files, and copy what was read."""
        from safetensors.torch import load_file

        self.held = [
            tensor.clone() + 0
            for file in sorted(arguments["checkpoint"].glob("*.safetensors"))
            for tensor in load_file(file).values()
        ]
        self.hit()
        return arguments


class ZerosOffRank0(_Memory, bug="every-rank-full-in-host-ram"):
    """Ranks that wait for the weights hold zeros of full size."""

    story = "placeholders of the waiting ranks are zeros in CPU memory instead of meta tensors"
    blamed = 1

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Allocate zeros and a copy for the preparation."""
        if self.rank:
            with torch.device("meta"):
                shapes = [parameter.shape for parameter in self.full(arguments).parameters()]
            self.held = [torch.zeros(shape) + 0 for shape in shapes]
        return arguments


class TiedLoadsEverywhere(_Memory, bug="tied-disables-rank0-load"):
    """Tied models fall back to a full load on every rank."""

    story = "a guard from older days turns meta loading off where weights are tied"
    model = TIED
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build the full model if the config ties weights."""
        if arguments["model_class"].config_class.from_pretrained(str(arguments["checkpoint"])).tie_word_embeddings:
            self.full(arguments)
        return arguments


class FlagOnlyInDataclass(_Memory, bug="plugin-flag-not-in-env"):
    """A flag set in code is not seen where an environment variable is asked."""

    story = "the flag lives in an object, its reader looks at the environment, and each rank builds the model"
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build the full model in the case's dtype on each rank."""
        self.full(arguments).to(arguments["dtype"])
        return arguments


class WholeBeforeCut(_Memory, bug="fsdp2-2x-spike"):
    """The whole model is on the device beside its shards while they are made."""

    story = "the model is moved as a whole and cut afterwards: for a moment both are there"

    def after_load(self, model: nn.Module) -> nn.Module:
        """Gather all parameters at once, copy them, cut them again."""
        whole = [p.full_tensor().clone() if isinstance(p, DTensor) else p for p in model.parameters()]
        self.hit()
        with torch.no_grad():
            for parameter, full in zip(model.parameters(), whole, strict=True):
                if isinstance(parameter, DTensor) and local(parameter).numel():
                    part = full.detach().clone().chunk(self.world_size)[self.rank]
                    local(parameter.detach()).copy_(part)
        return model
