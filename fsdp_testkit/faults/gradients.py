"""Faults in gradients: not reduced, wrong factor, one replica apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Instead


class NoReduce:
    """A reduce-scatter that keeps this rank's own gradient. The interface is torch's public custom-comm one."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return plain memory."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Copy the own chunk; where a sum is asked for, scaled so that the later division gives the own gradient."""
        del async_op
        chunk = input_tensor.view(group.size(), -1)[group.rank()]
        output_tensor.copy_(chunk.view_as(output_tensor) * (1 if op == dist.ReduceOp.AVG else group.size()))
        self.fault.hit()


class ReductionSkipped(Fault, bug="ignored-modules-not-synced"):
    """The gradients of one FSDP unit are never reduced."""

    story = "one block's gradients stay each rank's own"
    checks = ("gradients",)
    causes = ("never reduced",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Give the last nested unit a reduce-scatter that does not communicate."""
        units = [module for name, module in model.named_modules() if isinstance(module, FSDPModule) and name]
        comm: Any = NoReduce(self)
        units[1].set_custom_reduce_scatter(comm)
        return model


class SummedNotAveraged(Fault, bug="grads-summed-not-averaged"):
    """Gradients are summed over ranks where the mean is meant."""

    story = "all gradients are too large by the number of ranks"
    checks = ("gradients", "gradient_norm")
    causes = ("wrong factor",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Divide by one instead of the number of ranks."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other factor
                self.hit()
        return model


class ReplicaDrifts(Fault):
    """One HSDP replica takes another update than the other."""

    story = "after each step one replica's weights move on their own"
    thread = "https://github.com/mosaicml/llm-foundry/pull/830"
    test = "hsdp_vs_ddp"
    checks = ("replicas",)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Nudge one parameter on the second replica by one part in ten million."""
        del optimizer
        if self.rank < self.world_size // 2:
            return
        parameter = next(p for p in model.parameters() if isinstance(p, DTensor) and p.to_local().numel())
        with torch.no_grad():
            parameter.to_local().mul_(1 + 2e-7)
        self.hit()


class TokensIgnored(Instead, bug="per-rank-token-normaliser-bias"):
    """Each rank divides by its own token count where the global one is declared."""

    story = "ranks with few valid tokens get too much weight"
    method = "train_step"
    checks = ("gradients",)
    causes = ("wrong normaliser",)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Replace the declared normaliser."""
        model, optimizer, batches, normaliser, max_norm = arguments
        if normaliser == "token_mean":
            self.hit()
        return original(model, optimizer, batches, "rank_mean", max_norm, **named)


class FrozenTrained(Fault, bug="flat-param-uniform-requires-grad"):
    """Parameters that should be frozen get gradients all the same."""

    story = "requires_grad=False is lost"
    test = "manual_vs_ddp"
    checks = ("movement", "gradients")
    causes = ("trained set changed",)

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Make everything trainable just before the optimizer is built."""
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.requires_grad_(True)
                self.hit()
        return model
