"""Train, save, and load again: elsewhere, at other world sizes, into poisoned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.scenarios import kept, observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, inner_model, reply, resolved, torch_dtype
from fsdp_testkit.scenarios.traffic import Traffic
from fsdp_testkit.scenarios.train import begin, train


def save(context: Any, *, case: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Train the case's steps and save to ``folder``; the option ``format`` is ``safetensors`` or ``dcp``.

    The evidence holds the trace of the training; ``final/`` and buffers are what was saved. The fact ``traffic`` has
    the ``calls`` of collectives during the save and the bytes ``received``.
    """
    parsed = Case.from_json(case)
    with armed(parsed, context) as backend:
        loaded, evidence = kept.find(parsed) or trained(parsed, context.rank, backend, Path(checkpoint))
        observe.observe_buffers(loaded.model, evidence)
        with Traffic() as traffic:
            backend.save(loaded.model, Path(folder), layout=parsed.option("format", "safetensors"))
        evidence.facts["traffic"] = {"received": traffic.received, "calls": dict(traffic.calls)}
    return reply(context, evidence)


def trained(case: Case, rank: int, backend: Any, checkpoint: Path) -> tuple[Loaded, Evidence]:
    """Train a fresh model; return it and the evidence of its training."""
    loaded, evidence = begin(case, rank, backend, checkpoint)
    train(loaded, rank, evidence, range(case.steps))
    return loaded, evidence


def load(context: Any, *, case: str, folder: str, layouts: list[str]) -> dict[str, Any]:
    """Load ``folder`` under each layout and record weights; evidence ``load0``, ``load1``, ..."""
    parsed = Case.from_json(case)
    replies: dict[str, Any] = {}
    for index, text in enumerate(layouts):
        layout = Layout.parse(text, device=parsed.layout.device, comm=parsed.layout.comm)
        this = replace(parsed, layout=layout)
        with armed(this, context) as backend:
            evidence = observe_reload(this, backend, Path(folder), context.rank)
        replies |= reply(context, evidence, f"load{index}")
    return replies


def observe_reload(case: Case, backend: Any, folder: Path, rank: int) -> Evidence:
    """Load a folder with the backend into fresh, poisoned objects and record what is there."""
    evidence = Evidence(rank=rank)
    loaded = Loaded(case, backend, folder)
    evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
    observe.observe_tensors(inner_model(loaded.model).named_parameters(), evidence, "weight/")
    observe.observe_buffers(loaded.model, evidence)
    return evidence


def plain(context: Any, *, case: str, folder: str) -> dict[str, Any]:
    """Load ``folder`` with plain ``from_pretrained`` in one process.

    Where the model has code of its own, that is found through the folder, as by a user who has nothing else.
    """
    parsed = Case.from_json(case)
    _, model_class = resolved(parsed.model)
    evidence = Evidence(rank=context.rank)
    options = {"trust_remote_code": True, "local_files_only": True} if parsed.model.code else {}
    loader: Any = AutoModelForCausalLM if parsed.model.code else model_class
    model, info = loader.from_pretrained(folder, dtype=torch_dtype(parsed.dtype), output_loading_info=True, **options)
    observe_plain(model, evidence)
    evidence.facts["loading_info"] = {
        key: sorted(str(item) for item in value) for key, value in info.items() if value is not None and value
    }
    return reply(context, evidence)


def observe_plain(model: nn.Module, evidence: Evidence) -> None:
    """Record weights and buffers of an unsharded model."""
    evidence.facts["parameters"] = observe.observe_parameters(model)
    observe.observe_tensors(model.named_parameters(), evidence, "weight/")
    observe.observe_buffers(model, evidence)
