"""Every check is seen red for its own fault, with the fault counted as hit, and green without it."""

from __future__ import annotations

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.faults import gradients, saving, structure, weights
from fsdp_testkit.faults.base import Fault, faults_in

FAULTS = faults_in(gradients, saving, structure, weights)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_turns_its_check_red(engine: Engine, fault: type[Fault]) -> None:
    spec = ModelSpec(model_type=fault.model)
    rows = engine.armed(f"{fault.__module__}:{fault.__qualname__}").run_test(spec, fault.test, fault.variant)
    found = {finding["check"] for row in rows for finding in row.findings}
    assert rows[0].extra["fault_hits"] > 0
    assert any(row.outcome == "failed" for row in rows)
    assert found & set(fault.checks), f"found {sorted(found)} instead of one of {fault.checks}"
    assert "fault_hits" not in found


@pytest.mark.parametrize(
    ("model", "test", "variant"),
    sorted({(fault.model, fault.test, fault.variant) for fault in FAULTS}),
    ids=lambda value: value,
)
def test_green_without_a_fault(engine: Engine, model: str, test: str, variant: str) -> None:
    rows = engine.run_test(ModelSpec(model_type=model), test, variant)
    assert [row.outcome for row in rows] == ["passed"] * len(rows), describe(rows)
    assert all(row.checks > 0 for row in rows)


def test_a_fault_that_is_never_hit_is_an_error(engine: Engine) -> None:
    spec = ModelSpec(model_type="llama")
    rows = engine.armed(f"{__name__}:NeverHit").run_test(spec, "auto_vs_ddp", "untied")
    assert rows[0].outcome == "failed"
    assert [finding["check"] for finding in rows[0].findings] == ["fault_hits"]


def test_every_fault_names_what_it_shows() -> None:
    assert len(FAULTS) >= 20
    for fault in FAULTS:
        assert fault.story, fault
        assert fault.checks, fault


class NeverHit(Fault):
    story = "does nothing"
    checks = ("fault_hits",)


def describe(rows: list[Result]) -> str:
    return "\n".join(
        f"{row.layout}: {row.outcome} {row.reason} {row.extra.get('report', '')[:2000]}"
        for row in rows
        if row.outcome != "passed"
    )
