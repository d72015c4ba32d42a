"""The cores of the machine, shared by all workers of a session: the controller of xdist hands out slots."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.ranks import LeasedSlots, SlotBroker, Slots

BROKER = pytest.StashKey[SlotBroker]()
_ADDRESS = "fsdp_testkit_slots"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where slots are to be had; the first one starts the broker."""
    config = node.config
    if BROKER not in config.stash:
        config.stash[BROKER] = broker = SlotBroker()
        config.add_cleanup(broker.close)
    node.workerinput[_ADDRESS] = config.stash[BROKER].address


def session_slots(config: pytest.Config) -> Slots | None:
    """Return the slots of this session; ``None`` where this is its only process, which runs one job at a time."""
    address = getattr(config, "workerinput", {}).get(_ADDRESS)
    return LeasedSlots(address) if address else None
