"""Which tests of a model are still to come in this process: the engine runs them together."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.plugin.deadline import marked_deadline
from fsdp_testkit.plugin.items import CELL
from fsdp_testkit.plugin.options import is_worker

#: Class -> its items, in the order in which they run.
_ITEMS = pytest.StashKey[dict[type, list[pytest.Function]]]()
_GROUPED = "fsdp_testkit_grouped"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist whether all items of a class come to the same one."""
    node.workerinput[_GROUPED] = node.config.getvalue("dist") == "loadgroup"


def company(node: pytest.Item) -> list[tuple[str, str]]:
    """Return (test, variant) of the item itself and of those of its class that come after it.

    Items with another deadline, and those marked to be skipped, do not count. Under xdist nothing comes
    after an item where other workers may get the rest of the class.
    """
    config = node.config
    alone = [(cell.test, cell.variant)] if (cell := node.stash.get(CELL, None)) is not None else []
    if not isinstance(node, pytest.Function) or node.cls is None:
        return alone
    if is_worker(config) and not config.workerinput.get(_GROUPED):  # type: ignore[attr-defined]  # of xdist
        return alone
    if _ITEMS not in config.stash:
        classes: dict[type, list[pytest.Function]] = {}
        for item in node.session.items:
            if isinstance(item, pytest.Function) and item.cls is not None and CELL in item.stash:
                classes.setdefault(item.cls, []).append(item)
        config.stash[_ITEMS] = classes
    items = config.stash[_ITEMS].get(node.cls, [])
    if node not in items:
        return alone
    deadline = marked_deadline(node)
    following = [
        item
        for item in items[items.index(node) :]
        if marked_deadline(item) == deadline and not any(item.get_closest_marker(name) for name in ("skip", "skipif"))
    ]
    return [(item.stash[CELL].test, item.stash[CELL].variant) for item in following] or alone
