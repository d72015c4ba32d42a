"""Ranks on other machines: ``--fsdp-hosts``. Whether all tests fit is known before the first one runs."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.plugin.items import CELL
from fsdp_testkit.plugin.options import RUN_OPTIONS, usage_errors
from fsdp_testkit.ranks import Hosts
from fsdp_testkit.ranks.wire import read_secret

HOSTS = pytest.StashKey[Hosts]()


def pytest_configure(config: pytest.Config) -> None:
    """Read where the agents are and the secret; this connects to nobody."""
    options = config.stash[RUN_OPTIONS]
    if options.hosts:
        with usage_errors():
            config.stash[HOSTS] = Hosts(options.hosts, read_secret(options.secret_file))


def session_hosts(config: pytest.Config) -> Hosts | None:
    """Return the agents of this session; ``None`` where ranks are started on this machine."""
    return config.stash.get(HOSTS, None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse tests that need more ranks than there are, before anything runs."""
    config = session.config
    if config.option.collectonly or not (wanted := _largest(session.items)):
        return
    if (hosts := session_hosts(config)) is None:
        return
    ranks, item = max(wanted, key=lambda entry: entry[0])
    with usage_errors():
        room = hosts.room()
    there = sum(count for _, count in room)
    if ranks > there:
        names = ", ".join(dict.fromkeys(name for name, _ in room))
        raise pytest.UsageError(f"fsdp_testkit: {item.nodeid} needs {ranks} ranks; {names} have {there} together")


def _largest(items: list[pytest.Item]) -> list[tuple[int, pytest.Item]]:
    """Return items that run on ranks, each with the largest number of ranks of its jobs."""
    found: list[tuple[int, pytest.Item]] = []
    for item in items:
        mark: Any = item.get_closest_marker("ranks")
        cell = item.stash.get(CELL, None)
        if mark is not None and mark.args:
            found.append((mark.args[0], item))
        elif cell is not None and cell.test in TESTS:
            found.append((TESTS[cell.test].ranks, item))
    return found
