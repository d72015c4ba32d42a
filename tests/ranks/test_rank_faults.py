"""Every row of the fault table happens: see `faults.FAULTS` and ``docs/harness.md``."""

from __future__ import annotations

import pytest
from faults import FAULTS, Fault, strike

from fsdp_testkit.ranks import Harness


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title.replace(" ", "-").replace("`", ""))
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (4, 3)])
def test_fault(shared_harness: Harness, fault: Fault, world_size: int, rank: int) -> None:
    problem = strike(shared_harness, fault, world_size, rank, patience=4.0).problem
    assert not problem, problem
