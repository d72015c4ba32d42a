"""A gradient is taken apart into the ranks' and micro-batches' own ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fsdp_testkit.checks.parts import expected_shares, explain_gradients, first_bad_step
from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Finding
from fsdp_testkit.core.layout import Layout

CASE = Case(model=ModelSpec(model_type="llama"), layout=Layout(kind="fsdp", shard=2), max_norms=(0.0,))
OWN = np.random.default_rng(0).standard_normal((2, 6, 4))
Array = npt.NDArray[Any]


def data(values: Array) -> TensorData:
    return TensorData("float64", values.shape, np.ascontiguousarray(values).tobytes())


def truth(mean: Array, *, step: int = 0, clipped: bool = False) -> Evidence:
    facts = {
        "tokens": {str(step): [[30], [10]]},
        "norms": {str(step): 4.0 if clipped else 1.0},
        "losses": {str(step): [[1.0], [1.0]]},
    }
    return Evidence(0, facts, {f"gradient/{step}/w": data(mean), f"gradient/{step}/v": data(mean * 3 + 1)})


def parts(step: int = 0) -> Evidence:
    return Evidence(0, {"step": step}, {f"part/{rank}/0/w": data(OWN[rank]) for rank in range(2)})


def rank_zero(gradient: Array, step: int = 0) -> Evidence:
    return Evidence(
        0, {"parameters": {"w": {"dtensor": True, "placements": ["S0"]}}}, {f"gradient/{step}/w": data(gradient)}
    )


def detail(gradient: Array, **fields: Any) -> dict[str, Any]:
    finding = Finding(
        check="gradients", message="w differs", rank=0, step=0, parameter="w", judged_by="truth", **fields
    )
    (explained,) = explain_gradients([finding], [rank_zero(gradient)], truth(OWN.mean(0)), parts(), CASE, 0)
    return explained.detail


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((0.5, 0.5), [1, 1]), ((1.0, 0.0), [2, 0]), ((1.0, 1.0), [2, 2]), ((0.75, 0.25), [1.5, 0.5])],
)
def test_whose_data_with_which_weight(weights: tuple[float, float], shares: list[float]) -> None:
    found = detail((weights[0] * OWN[0] + weights[1] * OWN[1])[:3])
    assert found["parts"] == pytest.approx(shares, abs=1e-6)
    assert found["parts_rest"] < 1e-9
    assert "is_other" not in found


def test_what_is_no_mixture_is_said() -> None:
    found = detail(OWN[0][:3] ** 2)
    assert found["parts_rest"] > 0.1


def test_the_gradient_of_another_parameter_is_recognised() -> None:
    run = rank_zero((OWN.mean(0) * 3 + 1)[:3])
    run.facts["parameters"]["v"] = {"dtensor": True, "placements": ["S0"]}
    finding = Finding(check="gradients", message="", rank=0, step=0, parameter="w", judged_by="truth")
    (explained,) = explain_gradients([finding], [run], truth(OWN.mean(0)), parts(), CASE, 0)
    assert explained.detail["is_other"] == "v"


def test_parts_that_look_alike_are_not_told_apart() -> None:
    alike = Evidence(0, {"step": 0}, {f"part/{rank}/0/w": data(OWN[0]) for rank in range(2)})
    finding = Finding(check="gradients", message="", rank=0, step=0, parameter="w", judged_by="truth")
    (explained,) = explain_gradients([finding], [rank_zero(OWN[0][:3])], truth(OWN[0]), alike, CASE, 0)
    assert "parts" not in explained.detail


def test_other_findings_stay_as_they_are() -> None:
    others = [
        Finding(check="gradients", message="", rank=0, step=0, parameter="w", judged_by="ddp"),
        Finding(check="gradients", message="", rank=0, step=1, parameter="w", judged_by="truth"),
        Finding(check="gradients", message="w has no gradient", rank=0, step=0, parameter="gone", judged_by="truth"),
        Finding(check="ties", message="", rank=None),
    ]
    assert explain_gradients(others, [rank_zero(OWN[0][:3])], truth(OWN[0]), parts(), CASE, 0) == others
    assert first_bad_step(others) == 0
    assert first_bad_step(others[3:]) is None


def test_expected_shares_follow_the_normaliser_and_the_bound() -> None:
    assert expected_shares(truth(OWN[0]), CASE, 0) == [0.5, 0.5]
    assert expected_shares(truth(OWN[0], step=1), CASE, 1) == [0.75, 0.25]
    bounded = Case(model=CASE.model, layout=CASE.layout, max_norms=(2.0,))
    assert expected_shares(truth(OWN[0], clipped=True), bounded, 0) == pytest.approx([0.25, 0.25])
