"""Save weights and training state on some ranks, restore them on others; and save over the folder that was loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, inner_model, reply
from fsdp_testkit.scenarios.resume import restored
from fsdp_testkit.scenarios.saving import trained
from fsdp_testkit.scenarios.train import begin, train


def save(context: Any, *, case: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Train the case's steps and save weights and training state; ``final/`` and ``optimizer/`` are what was saved."""
    parsed = Case.from_json(case)
    with armed(parsed, context) as backend:
        loaded, evidence = begin(parsed, context.rank, backend, Path(checkpoint))
        optimizer, scheduler = train(loaded, context.rank, evidence, range(parsed.steps))
        observe.observe_buffers(loaded.model, evidence)
        backend.save(loaded.model, Path(folder) / "weights", layout=parsed.option("format", "dcp"))
        backend.save_training(loaded.model, optimizer, scheduler, Path(folder) / "training")
        evidence.facts["rates"] = scheduler.get_last_lr()
    return reply(context, evidence)


def restore(context: Any, *, case: str, folder: str, layouts: list[str]) -> dict[str, Any]:
    """Restore everything under each layout; evidence ``load0``, ``load1``, ... with ``weight/`` and ``optimizer/``."""
    parsed = Case.from_json(case)
    replies: dict[str, Any] = {}
    for index, text in enumerate(layouts):
        layout = Layout.parse(text, device=parsed.layout.device, comm=parsed.layout.comm)
        this = replace(parsed, layout=layout)
        evidence = Evidence(rank=context.rank)
        with armed(this, context) as backend:
            loaded, optimizer, scheduler = restored(this, context.rank, backend, Path(folder))
            evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
            observe.observe_tensors(inner_model(loaded.model).named_parameters(), evidence, "weight/")
            observe.observe_buffers(loaded.model, evidence)
            observe.observe_optimizer(loaded.model, optimizer, evidence)
            evidence.facts["rates"] = scheduler.get_last_lr()
        replies |= reply(context, evidence, f"load{index}")
    return replies


def save_over(context: Any, *, case: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Load a copy of the checkpoint, train, and save over that copy; then look at the model again.

    The evidence holds the weights before the save as ``final/`` and after it as ``weight/``, and the ``loss`` of a
    forward with each.
    """
    parsed = Case.from_json(case)
    target = Path(folder)
    if context.rank == 0:
        shutil.copytree(checkpoint, target)
    dist.barrier()
    with armed(parsed, context) as backend:
        loaded, evidence = trained(parsed, context.rank, backend, target)
        observe.observe_buffers(loaded.model, evidence)
        before = loss_of(loaded, context.rank)
        backend.save(loaded.model, target, layout=parsed.option("format", "safetensors"))
        dist.barrier()  # a rank may return before the others' files are written
        evidence.facts["loss"] = [before, loss_of(loaded, context.rank)]
        observe.reshard_all(loaded.model)
        observe.observe_tensors(inner_model(loaded.model).named_parameters(), evidence, "weight/")
    return reply(context, evidence)


def loss_of(loaded: Loaded, rank: int) -> float:
    """Return the loss of this rank's first batch, without dropout."""
    loaded.model.eval()
    with torch.no_grad():
        loss = loaded.model(**loaded.micro_batches(rank, 0)[0].inputs).loss
    loaded.model.train()
    return float(loss)
