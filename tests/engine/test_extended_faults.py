"""Every test of the extended tier is seen red for its own faults, with the fault counted as hit, and green without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.engine.engine import Engine, Settings
from fsdp_testkit.faults import extended
from fsdp_testkit.faults.base import Fault

FAULTS: list[type[Fault]] = [
    member
    for _, member in inspect.getmembers(extended, inspect.isclass)
    if issubclass(member, Fault) and member.__module__ == extended.__name__ and member.story
]
# faults of one model and test share truth and checkpoints
FAULTS.sort(key=lambda fault: (fault.model, fault.variant, fault.test, fault.__name__))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Settings())
    yield engine
    engine.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_of_the_extended_tier(engine: Engine, fault: type[Fault]) -> None:
    spec = ModelSpec(model_type=fault.model)
    rows = engine.armed(f"{fault.__module__}:{fault.__qualname__}").run_test(spec, fault.test, fault.variant)
    found = {finding["check"] for row in rows for finding in row.findings}
    assert rows[0].extra["fault_hits"] > 0, describe(rows)
    assert any(row.outcome == "failed" for row in rows), describe(rows)
    assert found & set(fault.checks), f"found {sorted(found)} instead of one of {fault.checks}"
    assert "fault_hits" not in found


CLEAN = sorted({(fault.model, fault.test, fault.variant) for fault in FAULTS})


@pytest.mark.parametrize(("model", "test", "variant"), CLEAN, ids=lambda value: value)
def test_green_without_a_fault_of_the_extended_tier(engine: Engine, model: str, test: str, variant: str) -> None:
    rows = engine.run_test(ModelSpec(model_type=model), test, variant)
    assert [row.outcome for row in rows] == ["passed"] * len(rows), describe(rows)
    assert all(row.checks > 0 for row in rows)


def test_every_test_of_the_tier_has_a_fault() -> None:
    assert {fault.test for fault in FAULTS} >= {info.name for info in TESTS.values() if info.tier == "extended"}


def describe(rows: list[Result]) -> str:
    return "\n".join(
        f"{row.layout}: {row.outcome} {row.reason} {row.extra.get('report', '')[:2000]}"
        for row in rows
        if row.outcome != "passed"
    )
