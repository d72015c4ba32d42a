"""Load, look at the structure, train a few steps and record every gradient, loss and weight."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdp_testkit.backends.base import Backend, MicroBatch
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.models.expectations import runs_in
from fsdp_testkit.scenarios import kept, observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import (
    Loaded,
    inner_model,
    make_scheduler,
    optimizer_config,
    reply,
    seed_everything,
)


def run(context: Any, *, case: str, checkpoint: str) -> dict[str, Any]:
    """Train on this rank; the evidence holds raw local shards of everything.

    Facts: ``parameters``, ``units`` and ``kept`` (FSDP only), ``buffers``, ``losses`` (step x micro-batch),
    ``norms``, ``lrs``, ``tokens``, ``batches`` (digests), ``digests`` (of weights after each step),
    ``gradients`` (names per step), ``optimizer``.
    """
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    with armed(parsed, context) as backend:
        loaded = Loaded(parsed, backend, Path(checkpoint))
        observe_loaded(loaded, context.rank, evidence)
        train(loaded, context.rank, evidence, range(parsed.steps))
    if not parsed.fault:
        kept.offer(parsed, loaded, evidence)
    return reply(context, evidence)


def begin(case: Case, rank: int, backend: Backend, checkpoint: Path) -> tuple[Loaded, Evidence]:
    """Load a model; return it and evidence that holds its parameters and their initial weights."""
    evidence = Evidence(rank=rank)
    loaded = Loaded(case, backend, checkpoint)
    evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
    observe.observe_tensors(inner_model(loaded.model).named_parameters(), evidence, "initial/")
    return loaded, evidence


def observe_loaded(loaded: Loaded, rank: int, evidence: Evidence) -> None:
    """Record structure, buffers and weights right after loading."""
    model = loaded.model
    evidence.facts["parameters"] = observe.observe_parameters(model)
    evidence.facts["plan"] = loaded.plan
    evidence.facts["training_mode"] = model.training
    observe.observe_buffers(model, evidence)
    observe.observe_tensors(inner_model(model).named_parameters(), evidence, "initial/")
    if loaded.case.layout.kind in ("fsdp", "hsdp"):
        if runs_in(loaded.case.model.model_type, loaded.case.dtype):
            evidence.facts["kept"] = plain_after_forward(loaded, rank)
        evidence.facts["units"] = observe.observe_units(model)
        observe.reshard_all(model)


def plain_after_forward(loaded: Loaded, rank: int) -> list[str]:
    """Run one forward without gradient and return the parameters that are plain tensors after it."""
    state = torch.get_rng_state()
    batch = loaded.micro_batches(rank, 0)[0]
    with torch.no_grad():
        loaded.model(**copy_inputs(batch))
    kept = observe.plain_parameters(loaded.model)
    observe.reshard_all(loaded.model)
    torch.set_rng_state(state)
    return kept


def copy_inputs(batch: MicroBatch) -> dict[str, Any]:
    """Return the inputs of a batch as fresh objects (some models change what they are given)."""
    return {name: copy.copy(value) for name, value in batch.inputs.items()}


def train(
    loaded: Loaded,
    rank: int,
    evidence: Evidence,
    steps: range,
    *,
    after_step: Callable[[int, torch.optim.Optimizer, Any], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
) -> tuple[torch.optim.Optimizer, Any]:
    """Train over ``steps`` and record the whole trace; return the optimizer and the scheduler.

    Gradients are read by an optimizer step pre-hook: after clipping, before the update, in any backend.
    """
    case, model, backend = loaded.case, loaded.model, loaded.backend
    facts = evidence.facts
    if optimizer is None:
        seed_everything(case, rank)
        optimizer = backend.make_optimizer(model, optimizer_config(case))
        scheduler = make_scheduler(optimizer)
    for name in ("losses", "norms", "lrs", "tokens", "batches", "digests", "gradients"):
        facts[name] = {}
    current = {"step": 0}

    def record(*_: Any) -> None:
        step = current["step"]
        gradients = list(observe.named_gradients(model))
        observe.observe_tensors(gradients, evidence, f"gradient/{step}/")
        facts["gradients"][str(step)] = [name for name, _ in gradients]

    handle = optimizer.register_step_pre_hook(record)
    for step in steps:
        current["step"] = step
        batches = loaded.micro_batches(rank, step)
        facts["tokens"][str(step)] = [batch.tokens for batch in batches]
        facts["batches"][str(step)] = [batch_digest(batch) for batch in batches]
        facts["lrs"][str(step)] = [group["lr"] for group in optimizer.param_groups]
        output = backend.train_step(model, optimizer, batches, case.normaliser(step), case.max_norm(step))
        scheduler.step()
        facts["losses"][str(step)] = output.losses
        facts["norms"][str(step)] = output.grad_norm
        if case.layout.kind in ("fsdp", "hsdp"):
            observe.reshard_all(model)
        facts["digests"][str(step)] = observe.digests(model)
        if after_step is not None:
            after_step(step, optimizer, scheduler)
    handle.remove()
    observe.observe_tensors(inner_model(model).named_parameters(), evidence, "final/")
    observe.observe_optimizer(model, optimizer, evidence)
    gathered(model, evidence)
    # what the generators would draw next: seen here also for models without dropout
    facts["draws"] = {"torch": torch.rand(2).tolist(), "python": random.random(), "numpy": float(np.random.rand())}
    return optimizer, scheduler


def gathered(model: nn.Module, evidence: Evidence) -> None:
    """Record gathered weights beside the raw shards: a gather that is wrong is a bug of its own."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for name, parameter in inner_model(model).named_parameters():
            if isinstance(parameter, DTensor):
                evidence.tensors[f"gathered/{name}"] = observe.tensor_data(parameter.full_tensor())


def batch_digest(batch: MicroBatch) -> str:
    """Return a digest of a micro-batch's tensors."""
    import hashlib

    state = hashlib.blake2b(digest_size=8)
    for name in sorted(batch.inputs):
        value = batch.inputs[name]
        if isinstance(value, torch.Tensor):
            state.update(name.encode())
            state.update(observe.tensor_data(value).data)
    return state.hexdigest()
