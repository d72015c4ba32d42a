"""Training under observation: forwards of blocks, dtypes of computation, reductions, evaluation between steps."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, inner_model, reply
from fsdp_testkit.scenarios.traffic import Traffic
from fsdp_testkit.scenarios.train import begin, copy_inputs, train
from fsdp_testkit.scenarios.truth import EVALUATION


def run(context: Any, *, case: str, checkpoint: str) -> dict[str, Any]:
    """Train as ``train:run`` does.

    Further facts: ``forwards`` (module -> number of forwards in training, in evaluation), ``computed`` (parameter ->
    dtypes that its module's forward saw), ``collectives`` (operator -> calls), and with the option ``evaluate`` those
    of `Evaluation`.
    """
    parsed = Case.from_json(case)
    with armed(parsed, context) as backend:
        loaded, evidence = begin(parsed, context.rank, backend, Path(checkpoint))
        after = Evaluation(loaded, context.rank, evidence).run if parsed.option("evaluate") else None
        watch_forwards(loaded, evidence)
        with Traffic() as traffic:
            train(loaded, context.rank, evidence, range(parsed.steps), after_step=after)
        evidence.facts["collectives"] = dict(traffic.calls)
    return reply(context, evidence)


def watch_forwards(loaded: Loaded, evidence: Evidence) -> None:
    """Count forwards of modules that hold parameters, and note in which dtypes these are when a forward begins."""
    forwards: dict[str, list[int]] = {}
    computed: dict[str, list[str]] = {}
    evidence.facts["forwards"], evidence.facts["computed"] = forwards, computed

    def hook_of(name: str) -> Callable[[nn.Module, Any], None]:
        counts = forwards[name] = [0, 0]

        def hook(module: nn.Module, _: Any) -> None:
            counts[0 if module.training else 1] += 1
            for leaf, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    seen = computed.setdefault(f"{name}.{leaf}", [])
                    if (dtype := observe.dtype_name(parameter.dtype)) not in seen:
                        seen.append(dtype)

        return hook

    for name, module in inner_model(loaded.model).named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(hook_of(name))


class Evaluation:
    """Forwards without gradient in evaluation mode, after each step.

    Facts: ``evaluation`` with, for each step, ``losses`` (of each micro-batch) and ``changed`` (names of what is not
    what it was before: weights, buffers, optimizer state, generators, gradients).
    """

    def __init__(self, loaded: Loaded, rank: int, evidence: Evidence) -> None:
        self.loaded, self.rank = loaded, rank
        self.results: dict[str, dict[str, Any]] = {}
        evidence.facts["evaluation"] = self.results
        # names now: after a forward some units may be gathered, and their parameters other objects
        self.names = observe.canonical_names(loaded.model)

    def run(self, step: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Evaluate after ``step``."""
        del scheduler
        model = self.loaded.model
        before = self._state(optimizer)
        model.eval()
        with torch.no_grad():
            batches = self.loaded.micro_batches(self.rank, step + EVALUATION)
            losses = [float(model(**copy_inputs(batch)).loss) for batch in batches]
        model.train()
        after = self._state(optimizer)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        self.results[str(step)] = {"losses": losses, "changed": changed}
        if step + 1 == self.loaded.case.steps:
            # what follows reads the sharded parameters; in between, training has to cope with gathered units
            observe.reshard_all(model)

    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        state: dict[str, str] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.names.get(id(parameter), "unbound")
                state[name] = digest(parameter)
                state[f"gradient of {name}"] = "none" if parameter.grad is None else digest(parameter.grad)
                for key, value in optimizer.state.get(parameter, {}).items():
                    state[f"{key} of {name}"] = digest(value) if isinstance(value, torch.Tensor) else repr(value)
        for name, buffer in inner_model(self.loaded.model).named_buffers():
            state[f"buffer {name}"] = digest(buffer)
        state["torch's generator"] = digest(torch.get_rng_state())
        state["python's generator"] = repr(hash(random.getstate()))
        state["numpy's generator"] = hashlib.blake2b(repr(np.random.get_state()).encode(), digest_size=8).hexdigest()
        return state


def digest(tensor: torch.Tensor) -> str:
    """Return a short digest of this rank's part of a tensor."""
    return hashlib.blake2b(observe.tensor_data(tensor).data, digest_size=8).hexdigest()
