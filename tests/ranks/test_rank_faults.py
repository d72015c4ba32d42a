"""Every row of the fault table happens: see `faults.FAULTS` and ``docs/harness.md``."""

from __future__ import annotations

import pytest
from faults import FAULTS, Fault, strike

from fsdp_testkit.ranks import Harness

CASES = [
    pytest.param(fault, size, rank, id=f"{fault.title.replace('`', '')}-{size}-{'all' if rank < 0 else rank}")
    for fault in FAULTS
    # two ranks struck on the first, four on the last, and two on both; the script that writes the table does the rest
    for size, rank in fault.places(2, 4)
    if (size, rank) in ((2, 0), (4, 3)) or ((size, rank) == (2, -1) and not fault.limit)
]


@pytest.mark.parametrize(("fault", "world_size", "rank"), CASES)
def test_fault(shared_harness: Harness, fault: Fault, world_size: int, rank: int) -> None:
    seen = strike(shared_harness, fault, world_size, rank, patience=4.0)
    if seen.lacks:
        pytest.skip(seen.lacks)
    assert not seen.problem
