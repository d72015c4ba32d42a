"""Which parameters form a unit where modules are tied, shared, read from outside, reversible or of several dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import Plan, PlanError
from fsdp_testkit.reference.units import apply, resolve


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.own = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.shared(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


def units_of(model: nn.Module, plan: Any = "auto") -> list[tuple[str, ...]]:
    return [unit.modules for unit in resolve(Plan.parse(plan), model)]


def test_blocks_that_tie_a_part_stay_apart_and_the_parts_are_one_unit() -> None:
    model = Stack()
    for name, parameter in model.layers[0].shared.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(model.layers[1].shared.get_submodule(owner), leaf, parameter)
    together = ("layers.0.shared", "layers.1.shared")
    assert units_of(model) == [together, ("layers.0",), ("layers.1",), ("",)]


def test_a_module_that_two_blocks_use_is_a_unit_of_its_own() -> None:
    model = Stack()
    model.layers[1].shared = model.layers[0].shared
    first, *others = units_of(model)
    assert first == ("layers.0.shared",)  # before both modules that use it
    assert sorted(others) == [("",), ("layers.0",), ("layers.1",)]


class Reading(nn.Module):
    """Reads a row of its embedding itself, as Gemma 4 does for the pad token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 5, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.embed.weight[0]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Asking(Reading):
    """Asks for the dtype only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).to(self.embed.weight.dtype))


@pytest.mark.parametrize(
    ("kind", "tie", "expected"),
    [
        (Reading, False, [("layers.0",), ("layers.1",), ("head",), ("",)]),
        (Reading, True, [("layers.0",), ("layers.1",), ("",)]),
        (Asking, False, [("embed",), ("layers.0",), ("layers.1",), ("head",), ("",)]),
    ],
)
def test_what_a_forward_further_out_reads_is_left_to_it(kind: Any, tie: bool, expected: list[tuple[str, ...]]) -> None:
    model = kind()
    if tie:
        model.head.weight = model.embed.weight
    assert units_of(model) == expected


def test_parts_of_a_reversible_block_are_units() -> None:
    class Reversible(Block):
        def backward_pass(self) -> None:
            """Runs the parts once more."""

    model = nn.Module()
    model.layers = nn.ModuleList([Reversible(), Reversible()])
    assert units_of(model)[:2] == [("layers.0.shared",), ("layers.0.own",)]


class Mixer(nn.Module):
    """Holds parameters of two dtypes itself, and reads a third one's from outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(3))
        self.conv = nn.Conv1d(4, 4, 3)
        self.wide = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) * self.conv.weight.sum() + self.log.sum() + self.bias


def mixers() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Mixer(), Mixer()])
    return model


def test_dtypes_that_one_forward_reads_are_groups_of_one_unit(claim: Any) -> None:
    with torch.device("meta"):
        model = mixers()
    units = resolve(Plan(), model)
    # what has a forward of its own leaves; what only the mixer's forward reads stays with it
    assert sorted(unit.modules for unit in units) == [
        ("",),
        *((f"layers.{index}{part}",) for index in range(2) for part in ("", ".wide")),
    ]
    apply(units, model, claim(0, 2))
    mixer = model.to_empty(device="cpu").layers[0]
    assert isinstance(mixer, FSDPModule)
    mixer.unshard()
    plain = {name: item.dtype for name, item in mixer.named_parameters() if not isinstance(item, DTensor)}
    half, full = torch.bfloat16, torch.float32
    assert plain == {"log": full, "conv.weight": full, "conv.bias": full, "bias": half}


def test_mixed_precision_cannot_leave_out_half_a_module() -> None:
    model = small.build("llama")
    model._keep_in_fp32_modules_strict = {"q_proj.weight"}
    plan = {
        "mode": "manual",
        "modules": {"model.layers.*.self_attn.q_proj": {}},
        "options": {"mixed_precision": "bfloat16"},
    }
    assert ("model.layers.0.self_attn.q_proj",) in units_of(model, plan)
    projection = model.model.layers[0].self_attn.q_proj
    projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    with pytest.raises(PlanError, match=r"q_proj' holds parameters that mixed precision leaves out"):
        units_of(model, plan)
