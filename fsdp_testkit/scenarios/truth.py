"""Truth: one process that plays every rank and micro-batch in turn, without communication.

The model is built in memory and never reloaded. Each played rank has its own data, random state and
dropout; gradients are combined by the case's declared normaliser. This file shares no code with the
training loops under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fsdp_testkit.backends.base import OptimizerConfig
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.models import adapter
from fsdp_testkit.models.build import build_model
from fsdp_testkit.models.plans import frozen_subset
from fsdp_testkit.models.tree import module_tree
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.common import (
    freeze,
    make_scheduler,
    micro_batches,
    optimizer_config,
    reply,
    resolved,
    seed_everything,
    torch_dtype,
    tree_of,
)

#: Added to the step's number for batches that are evaluated and never trained on.
EVALUATION = 1000


def run(context: Any, *, cases: list[str], checkpoint: str) -> dict[str, Any]:
    """Play each case; write the checkpoint folder first where it does not exist yet.

    Returns one evidence file per case, named ``truth0``, ``truth1``, ...
    """
    replies: dict[str, Any] = {}
    default: bool | None = None
    for index, text in enumerate(cases):
        case = Case.from_json(text)
        model = build_model(case.model, seed=case.seed, dtype=torch_dtype(case.dtype))
        if checkpoint and not Path(checkpoint).exists():
            write_checkpoint(model, Path(checkpoint))
        if number := case.option("nudge"):
            nudge(model, number)
        evidence = play(case, model)
        if default is None:
            default = is_tied(tree_of(replace(case.model, tie=None)))
        evidence.facts["default_tie"] = default
        replies |= reply(context, evidence, f"truth{index}")
    return replies


def nudge(model: nn.Module, number: int) -> None:
    """Move each weight by a unit in the last place, up, down or not at all, as generator ``number`` says."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            ways = torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.dtype)
            parameter.mul_(1.0 + ways * torch.finfo(parameter.dtype).eps)


def is_tied(tree: dict[str, Any]) -> bool:
    """Whether parameters of a module tree have several names."""
    return any(facts["aliases"] for facts in tree["parameters"].values())


def write_checkpoint(model: nn.Module, folder: Path) -> None:
    """Save the model as a user would, in several files, and move the folder into place at once."""
    partial = folder.with_name(folder.name + ".partial")
    saver: Any = model
    saver.save_pretrained(str(partial), max_shard_size="60KB")
    partial.rename(folder)


#: Called before each step with its number, the batches [rank][micro-batch] and the ranks' random states.
BeforeStep = Callable[[int, list[list[Any]], list[torch.Tensor]], None]


def play(case: Case, model: nn.Module, before_step: BeforeStep | None = None) -> Evidence:
    """Train ``model`` over the case's steps, playing all ranks of its layout."""
    config, model_class = resolved(case.model)
    model.train()
    tree = module_tree(model)
    if case.freeze:
        freeze(model, frozen_subset(tree))
    evidence = Evidence(rank=0)
    facts = evidence.facts
    facts["tree"] = tree
    if precision := case.option("mixed_precision"):
        kept = adapter.keeps_float32(model, torch_dtype(precision))
        facts["kept_in_fp32"] = [name for name, _ in model.named_parameters() if kept(name)]
        for block in tree["blocks"]:
            cast = partial(cast_inputs, torch_dtype(precision))
            model.get_submodule(block).register_forward_pre_hook(cast, with_kwargs=True)
    facts["recomputes"] = bool(getattr(model, "supports_gradient_checkpointing", False))
    facts["parameters"] = observe.observe_parameters(model)
    observe.observe_buffers(model, evidence)
    observe.observe_tensors(model.named_parameters(), evidence, "initial/")
    optimizer = make_optimizer(model, optimizer_config(case))
    scheduler = make_scheduler(optimizer)
    states = []
    for rank in range(case.layout.world_size):
        seed_everything(case, rank)
        states.append(torch.get_rng_state())
    for name in ("losses", "norms", "lrs", "tokens", "gradients", "clipped", "evaluation"):
        facts[name] = {}
    facts["idle_experts"] = []
    for step in range(case.steps):
        batches = [
            micro_batches(case, config, model_class, rank=rank, step=step) for rank in range(case.layout.world_size)
        ]
        if before_step is not None:
            before_step(step, batches, states)
        losses = play_step(case, model, batches, states, step, facts["idle_experts"])
        facts["losses"][str(step)] = losses
        facts["tokens"][str(step)] = [[batch.tokens for batch in group] for group in batches]
        facts["lrs"][str(step)] = [group["lr"] for group in optimizer.param_groups]
        norm = total_norm(model)
        bound = case.max_norm(step)
        facts["norms"][str(step)] = norm
        facts["clipped"][str(step)] = bool(bound) and norm > bound
        if bound:
            scale = min(1.0, bound / (norm + 1e-6))
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        facts["gradients"][str(step)] = [name for name, _ in observe.named_gradients(model)]
        observe.observe_tensors(observe.named_gradients(model), evidence, f"gradient/{step}/")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if case.option("evaluate"):
            facts["evaluation"][str(step)] = [
                evaluate(model, micro_batches(case, config, model_class, rank=rank, step=step + EVALUATION))
                for rank in range(case.layout.world_size)
            ]
    reached = {name for names in facts["gradients"].values() for name in names}
    tree["idle"] = idle_parameters(facts["parameters"], reached)
    observe.observe_tensors(model.named_parameters(), evidence, "final/")
    observe.observe_optimizer(model, optimizer, evidence)
    return evidence


def idle_parameters(parameters: dict[str, dict[str, Any]], reached: set[str]) -> list[str]:
    """Return the parameters of modules that no batch has entered.

    A trainable one is idle where it never got a gradient. A frozen one never gets any: it is idle where all the
    trainable ones are of the innermost module around it that holds any.

    Args:
        parameters: as in `observe_parameters`.
        reached: names of those that got a gradient.
    """
    trainable = [name for name, facts in parameters.items() if facts["requires_grad"]]
    idle = set(trainable) - reached
    for name in parameters.keys() - set(trainable):
        module = name
        beside: list[str] = []
        while module and not beside:
            module = module.rpartition(".")[0]
            beside = [other for other in trainable if other.startswith(f"{module}." if module else "")]
        if beside and not set(beside) & reached:
            idle.add(name)
    return [name for name in parameters if name in idle]


def block_of(name: str) -> str:
    """Return a parameter's FQN up to the first module that is a number; ``""`` where no module is one."""
    parts = name.split(".")[:-1]
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW in the groups that `OptimizerConfig` describes."""
    trainable = [(block_of(name), p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for number in range(config.split):
        lr = config.lr / 2**number
        mine = [item for index, item in enumerate(trainable) if index % config.split == number]
        for block in dict.fromkeys(name for name, _ in mine):
            here = [p for name, p in mine if name == block]
            groups.append({"params": [p for p in here if p.ndim >= 2], "weight_decay": config.weight_decay, "lr": lr})
            groups.append({"params": [p for p in here if p.ndim < 2], "weight_decay": 0.0, "lr": lr / 2})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        fused=True,
        betas=config.betas,
        eps=config.eps,
    )


def play_step(
    case: Case,
    model: nn.Module,
    batches: list[list[Any]],
    states: list[torch.Tensor],
    step: int,
    idle: list[dict[str, Any]],
) -> list[list[float]]:
    """Leave the step's combined gradient in ``.grad`` and return the losses [rank][micro-batch].

    ``rank_mean``: mean over ranks and micro-batches of the gradient of each one's own mean loss.
    ``token_mean``: the sum of those gradients, each weighted by its share of the step's valid tokens.
    """
    world, micro = len(batches), case.micro_batches
    total = sum(batch.tokens for group in batches for batch in group)
    gradients = PairwiseSum()
    losses: list[list[float]] = []
    forward = forward_of(case, model)
    for rank, group in enumerate(batches):
        torch.set_rng_state(states[rank])
        losses.append([])
        for batch in group:
            loss = forward(batch).loss
            losses[rank].append(float(loss.detach()))
            share = 1.0 / micro if case.normaliser(step) == "rank_mean" else batch.tokens * world / total
            (loss * share).backward()
        states[rank] = torch.get_rng_state()
        idle.extend(idle_experts(model, rank, step))
        gradients.add(dict(observe.named_gradients(model)))
        for parameter in model.parameters():
            parameter.grad = None
    combined = gradients.total()
    for name, parameter in model.named_parameters():
        if name in combined:
            parameter.grad = combined[name] / world
    return losses


class PairwiseSum:
    """A sum over ranks in pairs, and pairs of pairs: of all orders that with the smallest bound on its rounding.

    The bound grows with the logarithm of the number of terms
    (https://en.wikipedia.org/wiki/Pairwise_summation). It is also the order of a mesh whose axes have two ranks each:
    there a healthy backend agrees with truth to the last bit.
    """

    def __init__(self) -> None:
        #: Sums that wait for one of as many ranks.
        self._waiting: list[tuple[int, dict[str, torch.Tensor]]] = []

    def add(self, gradients: dict[str, torch.Tensor]) -> None:
        """Add the gradients of the next rank; what it has none of counts as zero."""
        ranks, found = 1, gradients
        while self._waiting and self._waiting[-1][0] == ranks:
            found = _sum(self._waiting.pop()[1], found)
            ranks *= 2
        self._waiting.append((ranks, found))

    def total(self) -> dict[str, torch.Tensor]:
        """Return the sum over all ranks; it starts anew afterwards."""
        found: dict[str, torch.Tensor] = {}
        for _, gradients in reversed(self._waiting):
            found = _sum(gradients, found)
        self._waiting.clear()
        return found


def _sum(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    both = {name: value + second[name] if name in second else value for name, value in first.items()}
    return second | both


def forward_of(case: Case, model: nn.Module) -> Callable[[Any], Any]:
    """Return the forward of a micro-batch; with mixed precision it computes with parameters cast to its dtype.

    The cast is part of the graph, so that gradients come back in the parameters' own dtype. What the model keeps in
    fp32 under that dtype is not cast.
    """
    if not (precision := case.option("mixed_precision")):
        return lambda batch: model(**batch.inputs)
    dtype = torch_dtype(precision)
    kept = adapter.keeps_float32(model, dtype)

    def mixed(batch: Any) -> Any:
        cast = {name: item if kept(name) else item.to(dtype) for name, item in model.named_parameters()}
        return torch.func.functional_call(model, cast, kwargs=batch.inputs)

    return mixed


def cast_inputs(dtype: torch.dtype, module: nn.Module, arguments: Any, named: Any) -> Any:
    """Cast the floating point tensors that enter a block, as FSDP2 does where a unit begins."""
    del module

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return tree_map_only(torch.Tensor, cast, (arguments, named))


def evaluate(model: nn.Module, batches: list[Any]) -> list[float]:
    """Return the losses of micro-batches in evaluation mode; leaves the model in training mode."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(**batch.inputs).loss) for batch in batches]
    model.train()
    return losses


def total_norm(model: nn.Module) -> float:
    """Return the 2-norm over all gradients, summed in float64."""
    squares = sum(
        float(parameter.grad.double().square().sum()) for parameter in model.parameters() if parameter.grad is not None
    )
    return math.sqrt(squares)


def idle_experts(model: nn.Module, rank: int, step: int) -> list[dict[str, Any]]:
    """Return experts (slices of fused 3-D expert weights) that got no gradient from this rank's data."""
    idle = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or parameter.ndim != 3 or "expert" not in name:
            continue
        used = parameter.grad.flatten(1).abs().amax(dim=1) > 0
        if not bool(used.all()):
            missing = [index for index, hit in enumerate(used.tolist()) if not hit]
            idle.append({"rank": rank, "step": step, "parameter": name, "experts": missing})
    return idle
