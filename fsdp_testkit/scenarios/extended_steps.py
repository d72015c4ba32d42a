"""Training steps of another shape: several forwards before one backward, and a step that has to be refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdp_testkit.backends.base import Backend, MicroBatch, OptimizerConfig, StepOutput
from fsdp_testkit.backends.loop import TrainingLoop
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, optimizer_config, reply, seed_everything
from fsdp_testkit.scenarios.train import begin, copy_inputs, train

#: The rank whose gradient is made non-finite.
POISONED = 1


class OneBackward:
    """A backend's model and optimizer in steps with all forwards before one backward, as in preference training.

    The gradient is that of the same micro-batches one after the other.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.loop = TrainingLoop()

    def make_optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the backend's optimizer."""
        return self.backend.make_optimizer(model, config)

    def train_step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[MicroBatch],
        normaliser: str,
        max_norm: float,
    ) -> StepOutput:
        """Run a step; arguments and result are those of `TrainingLoop.train_step`."""
        weights = self.loop.loss_weights(model, micro_batches, normaliser)
        losses = [model(**copy_inputs(batch)).loss for batch in micro_batches]
        sum(loss * weight for loss, weight in zip(losses, weights, strict=True)).backward()
        norm = self.loop.clip(model, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepOutput(losses=[float(loss.detach()) for loss in losses], grad_norm=norm)


def together(context: Any, *, case: str, checkpoint: str) -> dict[str, Any]:
    """Train as ``train:run`` does, in steps of `OneBackward`."""
    parsed = Case.from_json(case)
    with armed(parsed, context) as backend:
        loaded, evidence = begin(parsed, context.rank, backend, Path(checkpoint))
        stepping: Any = OneBackward(backend)
        loaded.backend = stepping
        train(loaded, context.rank, evidence, range(parsed.steps))
    return reply(context, evidence)


def guard(context: Any, *, case: str, checkpoint: str) -> dict[str, Any]:
    """Train a step, then one in which a single shard of one rank's gradient holds NaN.

    Facts: ``guard`` with ``poisoned`` (whether this rank's gradient was made non-finite), ``refused`` (the error of
    the second step, ``""`` where there was none) and ``changed`` (names of weights that the second step moved).
    """
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    with armed(parsed, context) as backend:
        loaded = Loaded(parsed, backend, Path(checkpoint))
        model = loaded.model
        seed_everything(parsed, context.rank)
        optimizer = backend.make_optimizer(model, optimizer_config(parsed))
        facts: dict[str, Any] = {"poisoned": False, "refused": ""}
        for step in range(2):
            if step and context.rank == POISONED:
                poison_gradient(model, facts)
            before = observe.digests(model)
            batches = loaded.micro_batches(context.rank, step)
            try:
                backend.train_step(model, optimizer, batches, parsed.normaliser(step), parsed.max_norm(step))
            except (ArithmeticError, RuntimeError, ValueError) as error:
                facts["refused"] = f"step {step}: {type(error).__name__}: {error}"
            observe.reshard_all(model)
        after = observe.digests(model)
        facts["changed"] = sorted(name for name in before if before[name] != after[name])
        evidence.facts["guard"] = facts
    return reply(context, evidence)


def poison_gradient(model: nn.Module, facts: dict[str, Any]) -> None:
    """Write NaN into this rank's shard of one gradient, once it is reduced."""
    chosen = next(parameter for parameter in model.parameters() if observe.local(parameter).numel())

    def spoil(parameter: Any) -> None:
        observe.local(parameter.grad).view(-1)[0] = float("nan")
        facts["poisoned"] = True

    chosen.register_post_accumulate_grad_hook(spoil)
