"""The training step that backends share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fsdp_testkit.backends.base import MicroBatch, OptimizerConfig, StepOutput, parameter_groups

NORMALISERS = ("rank_mean", "token_mean")


class TrainingLoop:
    """Default optimizer and training step of a data-parallel backend whose wrapper averages over ranks."""

    #: Whether gradients are reduced in each micro-batch; see `Features.reduce_each`.
    reduce_each = False
    #: Whether a step with a gradient that is not finite is refused; see `Features.refuse_nonfinite`.
    refuse_nonfinite = False

    def make_optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters in the groups of `parameter_groups`."""
        return torch.optim.AdamW(
            parameter_groups(model.named_parameters(), config),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # a tenth of the dispatches of DTensors, and the same bits whether whole or in parts
        )

    def train_step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[MicroBatch],
        normaliser: str,
        max_norm: float,
    ) -> StepOutput:
        """Run forward, backward, clipping and the optimizer step, and clear the gradients.

        With ``l`` the model's own mean loss of one micro-batch on one rank, the step's gradient is

        * ``rank_mean``: the mean of ``grad(l)`` over ranks and micro-batches;
        * ``token_mean``: the sum of ``grad(l) * tokens / (tokens of all ranks and micro-batches)``.

        Args:
            model: the wrapped model; its wrapper averages gradients over the world.
            optimizer: holds the model's parameters.
            micro_batches: this rank's share, at least one; the same number on every rank.
            normaliser: ``"rank_mean"`` or ``"token_mean"``.
            max_norm: gradients are scaled down to this total 2-norm; 0 only measures.

        Returns:
            This rank's losses before normalisation, and the total norm over all ranks before clipping.

        Raises:
            ValueError: an argument is not one of these.
            FloatingPointError: the gradient is not finite, and `refuse_nonfinite` is set.
        """
        if normaliser not in NORMALISERS:
            raise ValueError(f"normaliser={normaliser!r} must be one of {NORMALISERS}")
        if not micro_batches:
            raise ValueError("micro_batches is empty")
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm!r} must be at least 0")
        weights = self.loss_weights(model, micro_batches, normaliser)
        losses = []
        for index, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            with gradient_sync(model, last=self.reduce_each or index == len(micro_batches) - 1):
                loss = model(**batch.inputs).loss
                (loss * weight).backward()
            losses.append(float(loss.detach().item()))
        norm = self.clip(model, max_norm)
        if self.refuse_nonfinite and not math.isfinite(norm):  # the norm of all ranks, so that all of them refuse
            raise FloatingPointError(f"the total norm of the gradient is {norm}: this step is refused")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepOutput(losses=losses, grad_norm=norm)

    def loss_weights(self, model: nn.Module, micro_batches: Sequence[MicroBatch], normaliser: str) -> list[float]:
        """Return the factor of each micro-batch's loss, for a wrapper that averages over ranks."""
        if normaliser == "rank_mean":
            return [1.0 / len(micro_batches)] * len(micro_batches)
        tokens = [batch.tokens for batch in micro_batches]
        total, world = sum(tokens), 1
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            device = next(model.parameters()).device
            # offloaded parameters are on the CPU while the group may only speak CUDA
            if dist.get_backend() == "nccl":
                device = torch.device("cuda", torch.cuda.current_device())
            count = torch.tensor(total, dtype=torch.int64, device=device)
            dist.all_reduce(count)
            total = int(count.item())
        if total == 0:
            raise ValueError("token_mean needs at least one token over all ranks and micro-batches")
        return [count * world / total for count in tokens]

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients down to ``max_norm`` (0: leave them) and return their total 2-norm before.

        Works on local shards: the square of the norm is summed over the mesh axes that shard a gradient and
        over no other, which is what a DTensor's own norm does with many more dispatches.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(squared_norm(group) for group in by_layout(gradients)))
        if max_norm > 0 and (scale := max_norm / (norm + 1e-6)) < 1:
            for gradient in gradients:
                local_part(gradient).mul_(scale)
        return norm


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor, which shares its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_layout(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors that lie on the same mesh with the same placements, plain ones apart.

    Meshes are the same where they are equal: DTensor remembers results, so that a tensor of one load may come out on
    the mesh of an earlier one. The order of a sum must not depend on what a process has done before.
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        key = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    """Return the squared 2-norm over all of a group from `by_layout`, the same on every rank."""
    square = get_total_norm([local_part(tensor).detach() for tensor in tensors]).double() ** 2
    first = tensors[0]
    if isinstance(first, DTensor):
        for axis, placement in enumerate(first.placements):
            if placement.is_shard():
                dist.all_reduce(square, group=first.device_mesh.get_group(axis))
    return float(square.item())


def recompute(model: Any) -> None:
    """Have the blocks of a transformers model run their forward again in backward."""
    model.activation_checkpointing_enable({"use_reentrant": False})


@contextmanager
def gradient_sync(model: Any, *, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks only in the ``last`` micro-batch of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield
