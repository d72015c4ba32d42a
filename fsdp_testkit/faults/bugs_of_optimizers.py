"""Museum: bugs of optimizers, of clipping, and of the layouts that training runs on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fsdp_testkit.backends.base import Features
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Instead, local, locals_of


class OneGroupOfAll(Fault, bug="optimizer-gets-all-params"):
    """All parameters land in the first group of the optimizer, frozen ones too."""

    story = "rebinding after sharding fills the first group with every parameter of the model"
    test = "manual_vs_ddp"
    checks = ("optimizer_binding",)
    causes = ("optimizer on other tensors",)

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Merge the groups."""
        optimizer.param_groups[0]["params"] = list(model.parameters())
        del optimizer.param_groups[1:]
        self.hit()


class AdapterOfOtherRanks(Fault, bug="lora-trains-only-some-shards"):
    """On all ranks but the first, the optimizer holds placeholders of some trained parameters."""

    story = "beside frozen weights, the trained shards of rank 1 are replaced after the optimizer took them"
    test = "manual_vs_ddp"
    checks = ("optimizer_binding", "movement")
    causes = ("optimizer on other tensors",)
    blamed = 1

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Swap the first parameters for copies."""
        if self.rank:
            held = optimizer.param_groups[0]["params"]
            held[:3] = [nn.Parameter(parameter.detach().clone()) for parameter in held[:3]]
            self.hit()


class NotSwitched(Fault, bug="optimizer-param-not-switched"):
    """The map from old to new parameters misses one-dimensional ones."""

    story = "parameters that a cast replaced are not found again, and the optimizer keeps the old objects"
    checks = ("optimizer_binding", "movement")
    causes = ("optimizer on other tensors",)

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep copies in the groups of norms and biases, which are those without decay."""
        for group in optimizer.param_groups:
            if group["weight_decay"] == 0:
                group["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
                self.hit()


class KeyFromConfig(Fault, bug="mutual-tied-keyerror"):
    """Parameters are looked up by the names that the config implies."""

    story = "the optimizer's mapping asks for a head that a tied model does not list"
    variant = "tied"
    checks = ("ranks",)
    causes = ("rank died",)
    says = "KeyError"

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Look the head up by name."""
        self.hit()
        named = dict(model.named_parameters())
        assert named["lm_head.weight"] is not None
        return model


class OwnNorm(Instead, bug="logged-norm-is-local"):
    """The reported norm is that of this rank's shards."""

    story = "clipping is right, but the logged norm is read before it is summed over the shards"
    method = "clip"
    checks = ("gradient_norm",)
    causes = ("norm of one rank",)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Report another number."""
        norm = own_norm(arguments[0])
        original(*arguments, **named)
        self.hit()
        return norm


class ClippedByOwnNorm(Instead, bug="clip-on-cpu-grads-no-backend"):
    """Each rank clips by the norm of its own shards (the silent way around a missing CPU group)."""

    story = "gradients are scaled by a norm that never left the rank"
    method = "clip"
    checks = ("gradients", "gradient_norm")
    causes = ("norm of one rank",)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Clip without communication."""
        model, max_norm = arguments
        norm = own_norm(model)
        if max_norm and norm > max_norm:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(max_norm / norm)
        self.hit()
        return norm


def own_norm(model: nn.Module) -> float:
    """Return the norm over this rank's parts of the gradients."""
    parts = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


class ClipIgnored(Instead, bug="clip-args-never-reach-test"):
    """The bound of the norm gets lost on its way."""

    story = "max_norm is accepted and not passed on, so nothing is ever clipped"
    method = "clip"
    checks = ("gradients",)
    causes = ("switch without effect",)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Measure only."""
        model, max_norm = arguments
        if max_norm:
            self.hit()
        return original(model, 0.0, **named)


class MeshOfOthers(Fault, bug="fsdp-mesh-is-the-sp-mesh"):
    """The mesh of another kind of parallelism is passed: all ranks replicate, none shards."""

    story = "a 4 x 1 mesh stands where replicas x shards is 2 x 2: numbers are right, nothing is sharded"
    test = "hsdp_vs_ddp"
    checks = ("structure",)
    causes = ("reduced over the wrong group",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Swap the mesh."""
        self.hit()
        return arguments | {"layout": Layout(kind="hsdp", replicate=self.world_size, shard=1)}


class UnknownMode(Fault, bug="unknown-mode-falls-through"):
    """A sharding mode that is not understood runs as full sharding."""

    story = "the name of the hybrid mode is misspelt somewhere and the default branch takes over without a word"
    test = "hsdp_vs_ddp"
    checks = ("structure",)
    causes = ("switch without effect",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Shard over all ranks."""
        self.hit()
        return arguments | {"layout": Layout(kind="fsdp", shard=self.world_size)}


class ReplicasStartApart(Fault, bug="hsdp-replicas-start-different"):
    """The second replica starts from other weights."""

    story = "nothing brings the replicas to the same start: each one has drawn its own numbers"
    test = "hsdp_vs_ddp"
    checks = ("initial_weights", "replicas")
    causes = ("replica diverged",)
    blamed = 2

    def after_load(self, model: nn.Module) -> nn.Module:
        """Draw other numbers on the second replica."""
        if self.rank >= self.world_size // 2:
            generator = torch.Generator().manual_seed(7 + dist.get_rank() % (self.world_size // 2))
            for _, part in locals_of(model):
                part.copy_(torch.empty_like(part).normal_(std=0.02, generator=generator))
            self.hit()
        return model


class GuardIgnored(Fault, bug="nonfinite-guard-ignored"):
    """The switch that refuses steps with gradients that are not finite is accepted and not passed on."""

    story = "an error for NaN was asked for, none is raised, and the step spoils the weights"
    test = "nonfinite_guard"
    variant = "default"
    checks = ("guard",)
    causes = ("switch without effect",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Forget the switch."""
        features: Features = arguments["features"]
        self.hit()
        return arguments | {"features": replace(features, refuse_nonfinite=False)}
