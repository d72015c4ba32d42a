"""Adapters in models, batches of few words, groups of parameters: what the extended tier trains with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fsdp_testkit.backends.base import OptimizerConfig, parameter_groups
from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.models.adapted import ROWS, adapted
from fsdp_testkit.models.batches import make_batch
from fsdp_testkit.models.build import build_model, resolve
from fsdp_testkit.models.plans import ADAPTER, frozen_subset
from fsdp_testkit.models.tree import module_tree
from fsdp_testkit.scenarios.truth import make_optimizer


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_adapters_stand_beside_the_model(model_type: str) -> None:
    plain = build_model(ModelSpec(model_type=model_type), seed=0)
    model = build_model(ModelSpec(model_type=model_type, adapters=True), seed=0)
    names = dict(plain.named_parameters())
    added = {name: parameter for name, parameter in model.named_parameters() if name not in names}
    assert all(ADAPTER in name for name in added)
    assert sorted(p.shape[0] for name, p in added.items() if f"{ADAPTER}a" in name) == list(ROWS)
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in names.items())
    assert isinstance(model, type(plain))
    assert (type(model).__name__, type(model).__module__) == (type(plain).__name__, type(plain).__module__)
    # every other parameter is what a case with adapters freezes
    assert set(frozen_subset(module_tree(model))) == set(names)


def test_adapters_act_and_get_gradients() -> None:
    model = build_model(ModelSpec(model_type="llama", adapters=True), seed=0)
    config, model_class = resolve(ModelSpec(model_type="llama", adapters=True))
    assert model_class is adapted(type(build_model(ModelSpec(model_type="llama"), seed=0)))
    batch = make_batch(config, model_class, rank=0, step=0, micro=0, seed=0)
    loss = model(**batch.inputs).loss
    loss.backward()
    added = [parameter for name, parameter in model.named_parameters() if ADAPTER in name]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in added)
    with torch.no_grad():
        added[1].zero_()
        assert model(**batch.inputs).loss != loss


def test_batches_of_few_words() -> None:
    config, model_class = resolve(ModelSpec(model_type="llama"))

    def words(rank: int, few: int | None) -> set[int]:
        batch = make_batch(config, model_class, rank=rank, step=1, micro=0, seed=0, few=few)
        labels = batch.inputs["labels"]
        assert torch.equal(labels[labels >= 0], batch.inputs["input_ids"][labels >= 0])
        return set(batch.inputs["input_ids"].unique().tolist())

    assert len(words(0, None)) > 10
    assert len(words(0, 0)) == 2
    assert len({frozenset(words(rank, few)) for rank in range(3) for few in range(3)}) == 9


class Numbered(torch.nn.Module):
    """Names with numbers in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)])
        self.h_0 = torch.nn.Linear(2, 2)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.LayerNorm(2)])) for _ in range(2)
        )


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        # what is in no block, the head and the last norm with it, and two blocks: two groups each
        (lambda: build_model(ModelSpec(model_type="gpt2"), seed=0), 6),
        (Numbered, 6),
        # each layer is a block; the norm has nothing that decays
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), 3),
    ],
)
def test_groups_of_a_split_are_those_of_truth(make: Callable[[], torch.nn.Module], groups: int) -> None:
    model = make()
    assert len(parameter_groups(model.named_parameters(), OptimizerConfig())) == groups
    for split in (1, 3):
        config = OptimizerConfig(split=split)
        theirs, ours = parameter_groups(model.named_parameters(), config), make_optimizer(model, config).param_groups
        assert len(theirs) == len(ours) > split
        for left, right in zip(theirs, ours, strict=True):
            assert [id(parameter) for parameter in left["params"]] == [id(parameter) for parameter in right["params"]]
            assert (left["lr"], left["weight_decay"]) == (right["lr"], right["weight_decay"])
    assert len({group["lr"] for group in ours}) > 2
