"""Facts of a run, from evidence made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.diagnosis import RunFacts, of_case, of_run

CASE = Case(
    model=ModelSpec(model_type="llama", dropout=0.1),
    layout=Layout(kind="hsdp", replicate=2, shard=2),
    max_norms=(0.0, 0.5),
)


def rank(number: int, *, losses: float = 1.0, norm: float = 2.0) -> Evidence:
    steps = ("0", "1")
    return Evidence(number, {"losses": {s: [losses] for s in steps}, "norms": dict.fromkeys(steps, norm)})


def truth(**facts: Any) -> Evidence:
    return Evidence(
        0,
        {
            "tokens": {step: [[20], [10], [20], [10]] for step in ("0", "1", "2")},
            "norms": {"0": 2.0, "1": 2.0, "2": 2.0},
            "clipped": {"0": False, "1": True, "2": False},
            **facts,
        },
    )


def parts(**others: float) -> Evidence:
    facts = {name: [[value]] * 4 for name, value in others.items()}
    return Evidence(0, {"step": 1, "losses": [[2.0]] * 4, **facts})


def test_what_the_case_says() -> None:
    assert of_case(CASE) == RunFacts(world=4, replicate=2, shard=2, dropout=True)
    assert of_case(None) == RunFacts()


def test_tokens_bounds_and_steps_that_were_run() -> None:
    facts = of_run(CASE, [rank(number) for number in range(4)], truth(), None, None)
    assert facts.tokens == {0: 15.0, 1: 15.0}
    assert facts.token_mean == (1,)
    assert facts.clipped == {1: 4.0}
    assert facts.losses_as == ""
    assert facts.resumed_at is None


@pytest.mark.parametrize(
    ("norms", "holds"),
    [
        # the shards' norms, the same in both replicas
        ((math.sqrt(3), 1.0, math.sqrt(3), 1.0), True),
        ((2.0, 2.0, 2.0, 2.0), False),
        ((1.0, 1.0, 1.0, 1.0), False),
    ],
)
def test_norms_of_shards(norms: tuple[float, ...], holds: bool) -> None:
    run = [rank(number, norm=norm) for number, norm in enumerate(norms)]
    assert of_run(CASE, run, truth(), None, None).norm_of_shards is holds


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"with_initial_weights": 1.0}, "initial weights"),
        ({"with_first_random": 1.0, "with_initial_weights": 3.0}, "first random numbers"),
        ({"with_initial_weights": 1.1}, ""),
        ({"with_initial_weights": 2.0}, ""),
    ],
)
def test_what_the_losses_are_like(others: dict[str, float], words: str) -> None:
    run = [rank(number) for number in range(4)]
    assert of_run(CASE, run, truth(), parts(**others), 1).losses_as == words
