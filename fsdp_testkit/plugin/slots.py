"""The cores of the machine, shared by all workers of a session: the controller of xdist hands out slots."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.plugin.options import RUN_OPTIONS
from fsdp_testkit.ranks import LeasedSlots, SlotBroker, Slots

BROKER = pytest.StashKey[SlotBroker]()
_ADDRESS = "fsdp_testkit_slots"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where slots are to be had; the first one starts the broker."""
    config = node.config
    if (wanted := config.stash[RUN_OPTIONS].slots) == "none":
        return
    if BROKER not in config.stash:
        config.stash[BROKER] = broker = SlotBroker(None if wanted == "cores" else int(wanted))
        config.add_cleanup(broker.close)
    node.workerinput[_ADDRESS] = config.stash[BROKER].address


def session_slots(config: pytest.Config) -> Slots | None:
    """Return the slots of this session; ``None`` where none were asked for, and in a session of one process."""
    address = getattr(config, "workerinput", {}).get(_ADDRESS)
    return LeasedSlots(address) if address else None
