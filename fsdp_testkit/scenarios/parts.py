"""The parts of a step's gradient: each rank's and micro-batch's own, played by truth.

Run only where a gradient or a loss was found wrong: from the parts it is told who is missing from a sum, or
has too large a share in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.models.build import build_model
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.common import reply, torch_dtype
from fsdp_testkit.scenarios.train import copy_inputs
from fsdp_testkit.scenarios.truth import play


def run(context: Any, *, case: str, step: int) -> dict[str, Any]:
    """Play the case up to ``step`` and record that step's unweighted gradients, ``part/<rank>/<micro>/<name>``.

    Facts: ``step``, ``losses`` of each rank and micro-batch as they should be, and as they would be
    ``with_initial_weights`` or, with dropout, ``with_first_random`` numbers: those of the first step.
    """
    parsed = Case.from_json(case)
    evidence = Evidence(rank=0, facts={"step": step})
    model = build_model(parsed.model, seed=parsed.seed, dtype=torch_dtype(parsed.dtype))
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first: list[torch.Tensor] = []

    def before_step(number: int, batches: list[list[Any]], states: list[torch.Tensor]) -> None:
        if number == 0:
            first.extend(states)
        if number != step:
            return
        evidence.facts["losses"] = _losses(model, batches, states, evidence)
        if parsed.model.dropout:
            evidence.facts["with_first_random"] = _losses(model, batches, first)
        current = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        _write(model, initial)
        evidence.facts["with_initial_weights"] = _losses(model, batches, states)
        _write(model, current)

    play(replace(parsed, steps=step + 1), model, before_step)
    return reply(context, evidence)


def _losses(
    model: nn.Module, batches: list[list[Any]], states: list[torch.Tensor], evidence: Evidence | None = None
) -> list[list[float]]:
    """Return the loss of each rank and micro-batch; with evidence, also record its gradients."""
    losses: list[list[float]] = []
    for rank, group in enumerate(batches):
        torch.set_rng_state(states[rank])
        losses.append([])
        for micro, batch in enumerate(group):
            with torch.set_grad_enabled(evidence is not None):
                loss = model(**copy_inputs(batch)).loss
            losses[rank].append(float(loss.detach()))
            if evidence is not None:
                loss.backward()
                observe.observe_tensors(observe.named_gradients(model), evidence, f"part/{rank}/{micro}/")
                model.zero_grad(set_to_none=True)
    return losses


def _write(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
