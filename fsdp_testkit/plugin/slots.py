"""The cores and GPUs of the machine, shared by all workers of a session: the controller of xdist hands them out.

GPUs are always handed out, since two jobs on one of them disturb each other; cores where the user asks for it.
"""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.plugin.options import RUN_OPTIONS
from fsdp_testkit.ranks import LeasedSlots, SlotBroker, Slots
from fsdp_testkit.ranks.gpus import visible
from fsdp_testkit.ranks.slots import UNLIMITED

BROKER = pytest.StashKey[SlotBroker]()
_ADDRESS = "fsdp_testkit_slots"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where slots are to be had; the first one starts the broker."""
    config = node.config
    wanted, gpus = config.stash[RUN_OPTIONS].slots, visible()
    if wanted == "none" and not gpus:
        return
    if BROKER not in config.stash:
        capacity = {"cores": None, "none": UNLIMITED}[wanted] if wanted in ("cores", "none") else int(wanted)
        config.stash[BROKER] = broker = SlotBroker(capacity, gpus)
        config.add_cleanup(broker.close)
    node.workerinput[_ADDRESS] = config.stash[BROKER].address


def session_slots(config: pytest.Config) -> Slots | None:
    """Return the slots of this session; ``None`` where nothing is to be shared, and in a session of one process."""
    address = getattr(config, "workerinput", {}).get(_ADDRESS)
    return LeasedSlots(address) if address else None
