"""The training step that backends share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fsdp_testkit.backends.base import MicroBatch, OptimizerConfig, StepOutput, parameter_groups

NORMALISERS = ("rank_mean", "token_mean")


class TrainingLoop:
    """Default optimizer and training step of a data-parallel backend whose wrapper averages over ranks."""

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
            with gradient_sync(model, last=index == len(micro_batches) - 1):
                loss = model(**batch.inputs).loss
                (loss * weight).backward()
            losses.append(float(loss.detach().item()))
        norm = self.clip(model, max_norm)
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
        """Scale gradients down to ``max_norm`` (0: leave them) and return their total 2-norm before."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm > 0:
            clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm.item())


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
