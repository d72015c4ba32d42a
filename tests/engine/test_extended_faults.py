"""Every test of the extended tier is seen red for its own faults, with the fault counted as hit, and green without.

By default the cheaper half of the faults runs; ``--fsdp-tier extended`` runs all, and the tests without them.
"""

from __future__ import annotations

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.extended_tests import EXTENDED
from fsdp_testkit.faults import extended, museum
from fsdp_testkit.faults.base import Fault, faults_in

FAULTS = [fault for fault in faults_in(extended) if fault.story]
SAMPLE = [
    extended.EvaluationMoves,
    extended.HalfWritten,
    extended.Leak,
    extended.NothingRecomputed,
    extended.OffloadedLost,
    extended.ReducedEachTime,
    extended.ReducedInBf16,
    extended.ShortTensorsLost,
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    complete = metafunc.config.getoption("fsdp_tier") == "extended"
    faults = FAULTS if complete else SAMPLE
    if "fault" in metafunc.fixturenames:
        metafunc.parametrize("fault", faults, ids=lambda fault: fault.__name__)
    if "cell" in metafunc.fixturenames:
        cells = sorted({(fault.model, fault.test, fault.variant) for fault in faults})
        cells = cells if complete else [("llama", "evaluation", "default")]
        metafunc.parametrize("cell", cells, ids="-".join)


def test_fault_of_the_extended_tier(engine: Engine, fault: type[Fault]) -> None:
    spec = ModelSpec(model_type=fault.model)
    rows = engine.armed(f"{fault.__module__}:{fault.__qualname__}").run_test(spec, fault.test, fault.variant)
    found = {finding["check"] for row in rows for finding in row.findings}
    assert rows[0].extra["fault_hits"] > 0, describe(rows)
    assert any(row.outcome == "failed" for row in rows), describe(rows)
    assert found & set(fault.checks), f"found {sorted(found)} instead of one of {fault.checks}"
    assert "fault_hits" not in found


def test_green_without_a_fault_of_the_extended_tier(engine: Engine, cell: tuple[str, str, str]) -> None:
    model, test, variant = cell
    rows = engine.run_test(ModelSpec(model_type=model), test, variant)
    assert [row.outcome for row in rows] == ["passed"] * len(rows), describe(rows)
    assert all(row.checks > 0 for row in rows)


def test_every_test_of_the_tier_has_a_fault() -> None:
    shown = {entry.fault.test for entry in museum.entries() if entry.fault is not None}
    assert EXTENDED.keys() <= {fault.test for fault in FAULTS} | shown
    assert all(TESTS[name].tier == "extended" for name in EXTENDED)


def describe(rows: list[Result]) -> str:
    return "\n".join(
        f"{row.layout}: {row.outcome} {row.reason} {row.extra.get('report', '')[:2000]}"
        for row in rows
        if row.outcome != "passed"
    )
