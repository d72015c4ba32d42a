"""What the extended tier judges beside the trace, on evidence made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fsdp_testkit.checks import extended
from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout

CASE = Case(model=ModelSpec(model_type="llama"), layout=Layout(kind="fsdp", shard=2), steps=1).with_options(
    mixed_precision="bfloat16"
)


def seen(rank: int = 0, **facts: Any) -> Evidence:
    return Evidence(rank=rank, facts=facts)


def found(verdict: Verdict) -> list[str]:
    assert verdict.checks > 0
    return [finding.check for finding in verdict.findings]


@pytest.mark.parametrize(
    ("last", "each", "wrong"),
    [(4, 12, []), (12, 12, ["reductions"]), (4, 4, ["reductions"]), (0, 0, ["reductions"])],
)
def test_reductions(last: int, each: int, wrong: list[str]) -> None:
    runs = [[seen(collectives={"_reduce_scatter_base_": count, "allreduce_": 7})] for count in (last, each)]
    assert found(extended.check_reductions(*runs, 3)) == wrong


@pytest.mark.parametrize(
    ("forwards", "wrong"),
    [
        ({"a": [3, 3], "b": [6, 3]}, []),
        ({"a": [3, 3], "b": [6, 6]}, ["recomputation"]),
        ({"a": [3, 0]}, ["recomputation"]),
        ({}, ["recomputation"]),
    ],
)
def test_recomputation(forwards: dict[str, list[int]], wrong: list[str]) -> None:
    assert found(extended.check_recomputed([seen(forwards=forwards)])) == wrong


def mixed(values: np.ndarray[Any, Any], dtype: str = "float32", computed: str = "bfloat16") -> Evidence:
    evidence = seen(
        parameters={"w": {"dtype": "float32"}, "kept": {"dtype": "float32"}},
        computed={"w": [computed], "kept": ["float32"]},
        kept_in_fp32=["kept"],
        gradients={"0": ["w"]},
    )
    evidence.tensors["gradient/0/w"] = TensorData(dtype, values.shape, values.tobytes())
    return evidence


FINE = np.linspace(0.1, 0.9, 40, dtype=np.float32)
ROUND = (FINE.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def test_mixed_precision() -> None:
    truth = mixed(FINE)
    assert found(extended.check_precision([mixed(FINE)], truth, CASE)) == []
    assert found(extended.check_precision([mixed(FINE, computed="float32")], truth, CASE)) == ["precision"]
    in_bf16 = extended.check_precision([mixed(ROUND), mixed(ROUND)], truth, CASE)
    assert found(in_bf16) == ["precision"]
    assert "it was reduced in that dtype" in in_bf16.findings[0].message
    # truth's own values are round: nothing follows
    assert found(extended.check_precision([mixed(ROUND)], mixed(ROUND), CASE)) == []
    other = mixed(FINE)
    other.facts["computed"]["kept"] = ["bfloat16"]
    assert "keeps it in fp32" in extended.check_precision([other], truth, CASE).findings[0].message
    halves = mixed((ROUND.view(np.uint32) >> 16).astype(np.uint16), dtype="bfloat16")
    assert found(extended.check_precision([halves, mixed(FINE)], truth, CASE)) == ["precision"]


@pytest.mark.parametrize(
    ("losses", "changed", "wrong"),
    [([2.0], [], 0), ([2.001], [], 1), ([2.0], ["buffer scale"], 1), ([2.001], ["a", "b"], 2)],
)
def test_evaluation(losses: list[float], changed: list[str], wrong: int) -> None:
    truth = seen(evaluation={"0": [[9.0], [2.0]]})
    run = [seen(1, evaluation={"0": {"losses": losses, "changed": changed}})]
    assert found(extended.check_evaluation(run, truth, CASE)) == ["evaluation"] * wrong


def idle(*places: tuple[int, int, int]) -> Evidence:
    items = [{"rank": rank, "step": step, "parameter": "p", "experts": [expert]} for rank, step, expert in places]
    return seen(idle_experts=items, losses={"0": [[1.0], [1.0]]})


def test_routing_that_differs() -> None:
    assert not extended.differs_between_ranks(idle())
    assert not extended.differs_between_ranks(idle((0, 0, 3), (1, 0, 3)))
    assert extended.differs_between_ranks(idle((0, 0, 3), (1, 1, 3)))
    assert extended.differs_between_ranks(idle((0, 0, 3), (1, 0, 2)))


def rounds(*tensors: int, changed: int | None = None) -> list[Evidence]:
    counts = [{"tensors": count, "bytes": 10, "files": 3, "threads": 1} for count in tensors]
    return [
        seen(
            rounds=[
                {"format": "ab"[index % 2], "changed": ["w"] if index == changed else []} | count
                for index, count in enumerate(counts)
            ]
        )
    ]


def test_rounds() -> None:
    assert found(extended.check_rounds(rounds(1, 5, 7, 8, 7, 8, 7, 8))) == []
    assert found(extended.check_rounds(rounds(1, 5, 7, 8, 7, 9, 8, 9))) == []
    assert found(extended.check_rounds(rounds(1, 5, 7, 8, 7, 9, 7, 10))) == ["growth"]
    assert found(extended.check_rounds(rounds(1, 5, 7, 8, 7, 8, 7, 8, changed=4))) == ["drift"]


@pytest.mark.parametrize(
    ("refused", "complete", "wrong"), [("", True, []), ("Error", False, []), ("Error", True, ["lone_save"])]
)
def test_refusal(refused: str, complete: bool, wrong: list[str]) -> None:
    assert found(extended.check_refusal([seen(lone={"refused": refused})], complete)) == wrong
