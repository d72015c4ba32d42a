"""How often the first diagnosis is the expected one. Each bug's own test asserts its part; see `MISNAMED`."""

from __future__ import annotations

from fsdp_testkit.faults import museum
from fsdp_testkit.faults.misnamed import MISNAMED

#: Share of the bugs whose first diagnosis has to be right.
BAR = 0.9


def test_share_of_right_first_causes() -> None:
    real = {entry.bug for entry in museum.entries() if entry.real}
    assert MISNAMED.keys() <= real
    assert 1 - len(MISNAMED) / len(real) >= BAR
    assert all(reason for reason in MISNAMED.values())


def test_share_over_the_sample() -> None:
    sample = {fault.bug for fault in museum.sample()}
    assert {fault.causes[0] for fault in museum.sample()} <= museum.CAUSES.keys()
    assert 1 - len(MISNAMED.keys() & sample) / len(sample) >= BAR
