"""What all scenarios share: seeds, batches, the poisoned load, the evidence file."""

from __future__ import annotations

import copy
import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdp_testkit.backends.base import Backend, Features, MicroBatch, OptimizerConfig
from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.models.batches import make_batch
from fsdp_testkit.models.build import meta_model, prepare_dtype, resolve
from fsdp_testkit.models.plans import frozen_subset, manual_plan
from fsdp_testkit.models.tree import module_tree
from fsdp_testkit.scenarios.poison import poisoned_memory

OPTIMIZER = OptimizerConfig()
#: Options of a case that are features of the same name.
FEATURES = ("activation_checkpointing", "mixed_precision", "cpu_offload", "reduce_each", "refuse_nonfinite")


def optimizer_config(case: Case) -> OptimizerConfig:
    """Return what a case asks the optimizer to be; its option ``split`` is that of `OptimizerConfig`."""
    return replace(OPTIMIZER, split=case.option("split", 1))


def features_of(case: Case) -> dict[str, Any]:
    """Return the argument of a load for the features that a case asks for; nothing where it asks for none."""
    asked = {name: case.option(name) for name in FEATURES if case.option(name)}
    return {"features": Features(**asked)} if asked else {}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def seed_everything(case: Case, rank: int) -> None:
    """Seed all generators of one rank: each rank draws its own dropout masks."""
    seed = case.seed * 1009 + rank * 101 + 7
    random.seed(seed)
    np.random.seed(seed)
    if case.layout.device == "cuda":
        torch.manual_seed(seed)
    else:  # the same for the CPU, without a visit to every kind of accelerator
        torch.default_generator.manual_seed(seed)


def micro_batches(case: Case, config: Any, model_class: type, *, rank: int, step: int) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step; the option ``few`` is that of `make_batch`."""
    few = case.option("few")
    return [
        to_micro(make_batch(config, model_class, rank=rank, step=step, micro=micro, seed=case.seed, few=few), case)
        for micro in range(case.micro_batches)
    ]


def to_micro(batch: Any, case: Case) -> MicroBatch:
    """Move a batch to the case's device."""
    inputs = batch.inputs
    if case.layout.device == "cuda":
        inputs = {
            name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
    return MicroBatch(inputs=inputs, tokens=batch.tokens)


def resolve_plan(case: Case, tree: dict[str, Any]) -> Any:
    """Return what the backend gets as plan: ``auto``, the kit's manual plan, or the case's own JSON."""
    if case.plan == "manual":
        return manual_plan(tree)
    if case.plan.startswith("{"):
        return json.loads(case.plan)
    return case.plan


@functools.lru_cache(maxsize=16)
def _resolved(spec: ModelSpec) -> tuple[Any, Any]:
    return resolve(spec)


def resolved(spec: ModelSpec) -> tuple[Any, Any]:
    """Return a config of its own and the model class; what is costly is done once in the process it is forked from."""
    config, model_class = _resolved(spec)
    return copy.deepcopy(config), model_class


@functools.lru_cache(maxsize=16)
def tree_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the module tree of a spec, read from a model of the kit's own on the meta device. Do not change it."""
    return module_tree(meta_model(spec))


#: What this process has loaded.
_loads: set[tuple[ModelSpec, str, str]] = set()


def _load_key(case: Case) -> tuple[ModelSpec, str, str]:
    return replace(case.model, tie=None, dropout=0.0), case.backend, case.layout.kind


def has_loaded(case: Case) -> bool:
    """Return whether this process has loaded the case's model before, by the same backend on a layout of its kind."""
    return _load_key(case) in _loads


class Loaded:
    """A model that a backend has loaded, with what the kit knows about it."""

    def __init__(self, case: Case, backend: Backend, checkpoint: Path) -> None:
        self.case = case
        self.backend = backend
        self.config, self.model_class = resolved(case.model)
        # the tree is read from a model of the kit's own; most cases ask for nothing by name
        named = case.freeze or case.plan == "manual"
        self.tree = tree_of(case.model) if named else {}
        self.plan = resolve_plan(case, self.tree)
        with poisoned_memory(case.option("poison", "nan")):
            self.model: nn.Module = backend.load(
                checkpoint,
                model_class=self.model_class,
                layout=case.layout,
                plan=self.plan,
                dtype=torch_dtype(case.dtype),
                **features_of(case),
            )
        _loads.add(_load_key(case))
        # the same kernels as truth takes: some have no fp64 version
        prepare_dtype(inner_model(self.model), torch_dtype(case.dtype))
        self.model.train()
        if case.freeze:
            freeze(self.model, frozen_subset(self.tree))

    def micro_batches(self, rank: int, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step."""
        return micro_batches(self.case, self.config, self.model_class, rank=rank, step=step)


def freeze(model: nn.Module, names: list[str]) -> None:
    """Stop training the named parameters of a plain, sharded or DDP-wrapped model."""
    parameters = dict(inner_model(model).named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside a DDP wrapper."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that changes the learning rate at every step, so that a lost one is seen."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.25 * step))


def reply(context: Any, evidence: Evidence, name: str = "evidence") -> dict[str, Any]:
    """Write the evidence beside the job and return where it lies."""
    path = context.folder / f"{name}.{context.rank}.bin"
    evidence.write(path)
    context.observe(max(1, len(evidence.tensors)))
    return {name: str(path)}
