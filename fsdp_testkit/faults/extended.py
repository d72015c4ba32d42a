"""Faults that the extended tier has to find: what its tests judge, each broken once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from fsdp_testkit.backends.loop import recompute
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.gradients import FrozenTrained
from fsdp_testkit.faults.parts import AroundMicroBatch, BeforeClip, Instead, blocks_of, local, locals_of
from fsdp_testkit.reference.adapter import fp32_pattern

MOE = "qwen3_moe"


class ReducedEachTime(AroundMicroBatch):
    """Gradients are reduced in every micro-batch, although nobody asked for that: right values, too much traffic."""

    story = "the switch that leaves reductions to the last micro-batch has no effect"
    test = "accumulation"
    checks = ("reductions",)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Switch reductions on again."""
        if isinstance(model, FSDPModule) and not last:
            model.set_requires_gradient_sync(True)
            self.hit()


class EarlierLost(AroundMicroBatch):
    """A reduced gradient takes the place of those before it."""

    story = "where each micro-batch is reduced, the newest gradient replaces the sum"
    test = "accumulation"
    variant = "tied"
    checks = ("gradients",)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Drop what is there already."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = None
                self.hit()


class OffloadedLost(EarlierLost):
    """The same where parameters are offloaded."""

    test = "cpu_offload"
    variant = "default"

    def enter(self, model: nn.Module, last: bool) -> None:
        """Reduce each time, and drop what is there already."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        super().enter(model, last)


class RateOfFirstGroup(Fault):
    """All parameter groups learn at the first one's rate."""

    story = "learning rates of the groups beyond the first are lost"
    test = "accumulation"
    checks = ("optimizer_binding", "learning_rate")

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the first group's rate."""
        for group in optimizer.param_groups[1:]:
            group["lr"] = optimizer.param_groups[0]["lr"]
            self.hit()


class DividedByTwo(Fault):
    """Gradients are divided by 2 whatever the number of ranks."""

    story = "the divisor is right for two ranks and a constant"
    test = "mesh_shapes"
    checks = ("gradients",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Undo the wrapper's division by the world size."""
        if self.world_size > 2:
            model.register_forward_hook(self._scaled)
        return model

    def _scaled(self, module: Any, arguments: Any, output: Any) -> Any:
        if output.loss is not None and torch.is_grad_enabled():
            output.loss = Scaled.apply(output.loss, self.world_size / 2)
            self.hit()
        return output


class Scaled(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """The identity, with a gradient that is too large by a factor."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        """Return a copy of the value."""
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale the gradient."""
        return gradient * ctx.factor, None


class ShortTensorsLost(BeforeClip):
    """Tensors with fewer rows than ranks get no gradient."""

    story = "shards of no row are taken for parameters without gradient, on all ranks"
    test = "adapters"
    variant = "default"
    checks = ("gradients", "movement")

    def gradients(self, model: nn.Module) -> None:
        """Clear gradients of short tensors."""
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.shape[0] < self.world_size:
                local(parameter.grad).zero_()
                self.hit()


class BaseTrained(FrozenTrained):
    """The weights beside the adapters are trained too."""

    test = "adapters"
    variant = "default"


class MasksDrawnAgain(Fault):
    """Recomputed forwards draw dropout masks of their own."""

    story = "activation checkpointing does not put the generator back for the recomputation"
    test = "checkpointing"
    variant = "default"
    model = "gpt2"
    checks = ("gradients",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Switch checkpointing on without keeping the random state."""

        def forgetful(model: Any) -> None:
            self.hit()
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

        return [(recompute, forgetful)]


class NothingRecomputed(Fault):
    """Activation checkpointing is asked for and stays off."""

    story = "the option is accepted and does nothing: memory is what it was"
    test = "checkpointing"
    variant = "default"
    checks = ("recomputation",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Do nothing."""
        return [(recompute, lambda _: self.hit())]


class EvaluationMoves(Fault):
    """A forward in evaluation mode changes a weight by two parts in a million."""

    story = "a running statistic is updated in evaluation too"
    test = "evaluation"
    variant = "default"
    checks = ("evaluation",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Change a weight after each such forward."""

        def move(module: nn.Module, *_: Any) -> None:
            if not module.training:
                with torch.no_grad():
                    local(next(parameter for parameter in self.sharded if local(parameter).numel())).mul_(1 + 2e-6)
                self.hit()

        self.sharded = list(model.parameters())
        model.register_forward_hook(move)
        return model


class EvaluatedBefore(Fault):
    """Evaluation mode computes with the weights of the load."""

    story = "the copy that evaluation uses is not refreshed after a step"
    test = "evaluation"
    variant = "default"
    checks = ("evaluation",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Swap weights around each such forward."""
        old = {name: part.clone() for name, part in locals_of(model)}
        parts = dict(locals_of(model))

        def swap(module: nn.Module, *_: Any) -> None:
            if not module.training:
                for name, part in parts.items():
                    now = part.clone()
                    part.copy_(old[name])
                    old[name] = now
                self.hit()

        model.register_forward_pre_hook(torch.no_grad()(swap), prepend=True)  # before units are gathered
        model.register_forward_hook(torch.no_grad()(swap))
        return model


class KeptModulesCast(Fault):
    """Modules that the model keeps in fp32 compute in bf16 under mixed precision."""

    story = "one policy for all units: what has to stay in fp32 is cast with the rest"
    thread = "docs/findings.md"
    test = "mixed_precision"
    variant = "default"
    model = "ernie4_5_moe"
    checks = ("precision",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Find no such module."""

        def none(*_: Any) -> None:
            self.hit()

        return [(fp32_pattern, none)]


class Policy(Fault):
    """Units get another mixed-precision policy than asked for."""

    test = "mixed_precision"
    variant = "default"
    checks = ("precision",)
    wrong: ClassVar[dict[str, Any]]

    def patches(self) -> list[tuple[Any, Any]]:
        """Change the policy's arguments."""
        original = MixedPrecisionPolicy  # this module's own name is replaced too

        def policy(**arguments: Any) -> Any:
            if arguments.get("param_dtype") is not None:
                self.hit()
                arguments |= self.wrong
            return original(**arguments)

        return [(MixedPrecisionPolicy, policy)]


class ReducedInBf16(Policy):
    """Gradients are reduced in the computing dtype."""

    story = "the reduction's dtype is left to its default, which is that of the computation"
    wrong: ClassVar[dict[str, Any]] = {"reduce_dtype": None}


class PrecisionIgnored(Policy):
    """Mixed precision is asked for and everything computes in fp32."""

    story = "the option is accepted and does nothing"
    wrong: ClassVar[dict[str, Any]] = {"param_dtype": None}


class AveragedOverUsers(Fault):
    """The mean is taken over those ranks whose gradient is not zero."""

    story = "experts without a token on some ranks get the mean of the others"
    test = "idle_experts"
    variant = "default"
    model = MOE
    checks = ("gradients",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Give the last block a reduction of its own."""
        comm: Any = MeanOfUsers(self)
        unit: Any = blocks_of(model)[-1]
        unit.set_custom_reduce_scatter(comm)
        return model


class MeanOfUsers:
    """A reduce-scatter that leaves zeros out of the mean. The interface is torch's public custom-comm one."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return plain memory."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Sum up, scaled so that the later division gives the mean of those that are not zero."""
        del op, async_op
        users = torch.empty_like(output_tensor)
        dist.reduce_scatter_tensor(users, (input_tensor != 0).to(users.dtype), group=group)
        dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group)
        output_tensor.mul_(group.size() / users.clamp(min=1))
        self.fault.hit()


class Drift(Fault):
    """Each load changes a weight in its last bit."""

    story = "a value goes through another dtype and back at each load"
    test = "repeated_saving"
    variant = "default"
    checks = ("drift",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Change the first tensor."""
        _, part = next(locals_of(model))
        part.mul_(1 + 2e-7)
        self.hit()
        return model


class Leak(Fault):
    """Each load leaves a copy of the weights behind."""

    story = "a cache keeps what was read for a model that is gone"
    test = "repeated_saving"
    variant = "default"
    checks = ("growth",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Keep copies."""
        self.kept = [*getattr(self, "kept", []), *(part.clone() for _, part in locals_of(model))]
        self.hit()
        return model


class OwnShards(Instead):
    """A rank that saves alone writes its own shards as if they were the model."""

    story = "without the other ranks a save takes local parts for whole tensors"
    method = "save"
    test = "lone_save"
    variant = "default"
    checks: ClassVar[tuple[str, ...]] = ("reload", "ranks")

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Write local parts, without communication."""
        model, folder = arguments[0], Path(arguments[1])
        folder.mkdir(parents=True)
        parts = {name: part.contiguous() for name, part in locals_of(model)}
        save_file(parts, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str), encoding="utf-8")
        self.hit()


class HalfWritten(OwnShards):
    """The save fails when the others do not come, and its files stay."""

    story = "the error comes after files have been written under their final names"
    checks: ClassVar[tuple[str, ...]] = ("lone_save",)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Write, then fail."""
        super().instead(original, *arguments, **named)
        raise RuntimeError("timed out waiting for the other ranks")
