"""Ranks on other machines: ``--fsdp-hosts``. Whether all tests fit is known before the first one runs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fsdp_testkit.core.errors import KitError, UsageError
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.plugin.items import CELL
from fsdp_testkit.plugin.options import RUN_OPTIONS, is_worker, usage_errors
from fsdp_testkit.plugin.torchrun import serve_or_lead
from fsdp_testkit.ranks import Hosts
from fsdp_testkit.ranks.meet import Torchrun
from fsdp_testkit.ranks.wire import read_secret

HOSTS = pytest.StashKey[Hosts]()
_REFUSAL = pytest.StashKey[str]()


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
    if not is_worker(config):
        with usage_errors():
            _find_hosts(config, wanted)
        return
    try:
        _find_hosts(config, wanted)
    except KitError as error:  # xdist has no usage errors of workers
        config.stash[_REFUSAL] = f"fsdp_testkit: {error}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In a worker of xdist: what was refused fails all tests on ranks, and none of them runs."""
    if (refusal := item.config.stash.get(_REFUSAL, "")) and _largest([item]):
        pytest.fail(refusal, pytrace=False)


def _find_hosts(config: pytest.Config, wanted: list[tuple[int, pytest.Item]]) -> None:
    outer = Torchrun.read(os.environ)
    if (hosts := session_hosts(config)) is not None:
        room = hosts.room()
        names = ", ".join(dict.fromkeys(name for name, _ in room))
        _check(wanted, sum(count for _, count in room), names)
    elif outer is not None:
        _check(wanted, outer.world_size, "torchrun's processes")
        config.stash[HOSTS] = serve_or_lead(config, outer)


def _check(wanted: list[tuple[int, pytest.Item]], there: int, whose: str) -> None:
    ranks, item = max(wanted, key=lambda entry: entry[0])
    if ranks > there:
        raise UsageError(f"{item.nodeid} needs {ranks} ranks, and {whose} have {there}")


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
