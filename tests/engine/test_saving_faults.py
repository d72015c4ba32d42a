"""Every test of saving beyond the core is seen red for its own faults, with the fault hit, and green without."""

from __future__ import annotations

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.saving_tests import SAVING
from fsdp_testkit.faults import saving_again
from fsdp_testkit.faults.base import Fault, faults_in

FAULTS = faults_in(saving_again)
SPEC = ModelSpec(model_type="llama")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_of_a_save(engine: Engine, fault: type[Fault]) -> None:
    armed = engine.armed(f"{fault.__module__}:{fault.__qualname__}")
    work = armed.work(SPEC)
    before = work.fault_hits
    outcomes = SAVING[fault.test](armed, work)
    found = {finding.check for outcome in outcomes for finding in outcome.verdict.findings}
    assert work.fault_hits > before
    assert found & set(fault.checks), f"found {sorted(found)} instead of one of {fault.checks}"


@pytest.mark.parametrize("name", SAVING)
def test_green_without_a_fault_of_a_save(engine: Engine, name: str) -> None:
    for outcome in SAVING[name](engine, engine.work(SPEC)):
        assert not outcome.outcome
        assert outcome.verdict.findings == []
        assert outcome.verdict.checks > 50


def test_every_test_of_saving_has_a_fault() -> None:
    assert {fault.test for fault in FAULTS} == SAVING.keys()
