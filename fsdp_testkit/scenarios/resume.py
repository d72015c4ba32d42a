"""An uninterrupted run that saves half-way, and a run in fresh processes that goes on from there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, make_scheduler, optimizer_config, reply
from fsdp_testkit.scenarios.train import train


def half(case: Case) -> int:
    """Return the number of steps before the save."""
    return case.steps // 2


def uninterrupted(context: Any, *, case: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Train all steps; after half of them save weights and training state to ``folder`` and go on."""
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    with armed(parsed, context) as backend:
        loaded = Loaded(parsed, backend, Path(checkpoint))
        evidence.facts["parameters"] = observe.observe_parameters(loaded.model)

        def save(step: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
            if step + 1 == half(parsed):
                backend.save(loaded.model, Path(folder) / "weights", layout=parsed.option("format", "dcp"))
                backend.save_training(loaded.model, optimizer, scheduler, Path(folder) / "training")

        train(loaded, context.rank, evidence, range(parsed.steps), after_step=save)
    return reply(context, evidence)


def resumed(context: Any, *, case: str, folder: str) -> dict[str, Any]:
    """Load weights and training state into fresh objects under scrambled generators and go on."""
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    with armed(parsed, context) as backend:
        loaded, optimizer, scheduler = restored(parsed, context.rank, backend, Path(folder))
        evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
        observe.observe_optimizer(loaded.model, optimizer, evidence, prefix="restored/")
        evidence.facts["restored"] = evidence.facts.pop("optimizer")
        train(
            loaded,
            context.rank,
            evidence,
            range(half(parsed), parsed.steps),
            optimizer=optimizer,
            scheduler=scheduler,
        )
    return reply(context, evidence)


def restored(
    case: Case, rank: int, backend: Backend, folder: Path
) -> tuple[Loaded, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Load weights and training state from ``folder`` into fresh objects, under scrambled generators."""
    scramble(rank)
    loaded = Loaded(case, backend, folder / "weights")
    optimizer = backend.make_optimizer(loaded.model, optimizer_config(case))
    scheduler = make_scheduler(optimizer)
    backend.load_training(loaded.model, optimizer, scheduler, folder / "training")
    return loaded, optimizer, scheduler


def scramble(rank: int) -> None:
    """Put every generator into a state that no healthy run has."""
    random.seed(990_001 + rank)
    np.random.seed(990_011 + rank)
    torch.manual_seed(990_023 + rank)
