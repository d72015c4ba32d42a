"""Truth and DDP add over ranks in one order, so that what they differ by is no rounding of sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.tests import auto_case
from fsdp_testkit.ranks import Job
from fsdp_testkit.scenarios.truth import PairwiseSum

#: Half a unit in the last place of 1. In fp32 it is lost in ``1 + HALF``, and ``HALF + HALF`` is not.
HALF = 2.0**-24
#: Only in pairs is their sum ``1 + 2 * HALF``: one by one it is 1 or ``1 + 4 * HALF``, wherever one begins.
TERMS = [1.0, HALF, HALF, HALF]


@pytest.mark.parametrize(
    ("terms", "total"),
    [
        (TERMS, 1 + 2 * HALF),
        (TERMS[:3], 1 + 0 * HALF),
        ([HALF, HALF, 1.0], 1 + 2 * HALF),
        ([HALF, HALF, HALF, HALF, 1.0, HALF], 1 + 4 * HALF),
        ([3.0], 3.0),
    ],
)
def test_truth_adds_ranks_in_pairs(terms: list[float], total: float) -> None:
    added = PairwiseSum()
    for term in terms:
        added.add({"weight": torch.tensor([term])})
    assert added.total()["weight"].item() == total
    assert added.total() == {}


def test_what_a_rank_has_no_gradient_of_counts_as_zero() -> None:
    added = PairwiseSum()
    for gradients in ({"a": 1.0}, {"b": 2.0}, {"a": 4.0, "b": 8.0}, {}, {"c": 16.0}):
        added.add({name: torch.tensor(value) for name, value in gradients.items()})
    assert {name: value.item() for name, value in added.total().items()} == {"a": 5.0, "b": 10.0, "c": 16.0}


@pytest.mark.parametrize(("world", "total"), [(2, 1.0), (3, 1.0), (4, 1 + 2 * HALF)])
def test_ddp_adds_ranks_in_pairs(engine: Engine, world: int, total: float) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=False))
    case = auto_case(engine, work, "auto_vs_ddp")
    work.prepare([case])
    layout = Layout(kind="ddp", replicate=world)
    args = {
        "case": replace(case, backend="ddp", layout=layout).to_json(),
        "checkpoint": str(work.checkpoint),
        "terms": TERMS,
    }
    report = work.jobs.harness.run(Job(target="engine.sum_targets:averaged", world_size=world, args=args))
    assert report.outcome == "passed", report.failure and report.failure.render()
    expected = (torch.tensor(total) / world).item()
    assert [reply.value for reply in report.replies] == [[expected]] * world
    report.discard()
