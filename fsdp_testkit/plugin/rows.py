"""Rows on their way from the item to the session that sums them up, through xdist where it is used.

They ride on the item's report, as JSON text in an attribute: it crosses to the controller as soon as the item
has finished, so a worker that dies later takes nothing with it, and JUnit, which copies user properties, does
not see it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fsdp_testkit.core.result import Result
from fsdp_testkit.plugin.items import CELL
from fsdp_testkit.plugin.options import RUN_OPTIONS, is_worker
from fsdp_testkit.plugin.scheduling import scope_of
from fsdp_testkit.plugin.session import error_row

#: Set by the mixin on the item: its rows, after the ledger.
ROWS = pytest.StashKey[list[Result]]()


@dataclass(slots=True)
class RowStore:
    """All rows of a session, by item. An item that ran twice keeps its last rows.

    Attributes:
        items: node id -> rows.
        missing: node id -> row of an FSDP item that ended without rows of its own.
    """

    items: dict[str, list[Result]] = field(default_factory=dict)
    missing: dict[str, Result] = field(default_factory=dict)

    def rows(self) -> list[Result]:
        """Return all rows in the order in which their items ended."""
        lost = [row for nodeid, row in self.missing.items() if nodeid not in self.items]
        return [*(row for rows in self.items.values() for row in rows), *lost]


STORE = pytest.StashKey[RowStore]()


def pytest_configure(config: pytest.Config) -> None:
    """Prepare an empty store."""
    config.stash[STORE] = RowStore()
    if not is_worker(config):
        config.pluginmanager.register(_Collector(config), "fsdp_testkit_collector")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the item's place in the matrix to its reports, and its rows to the report of the call."""
    report = yield
    if (cell := item.stash.get(CELL, None)) is not None:
        rows = item.stash.get(ROWS, None)
        # reports take attributes of any name, and xdist carries the plain ones
        vars(report)["fsdp_cell"] = list(cell)
        if report.when == "call" and rows is not None:
            vars(report)["fsdp_rows"] = pack(rows)
    return report


class _Collector:
    """Takes the rows out of the reports. On the controller of xdist and in a plain session, not on workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.store = config.stash[STORE]
        self.backend = config.stash[RUN_OPTIONS].engine.backend
        self.models: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the rows; remember an FSDP item that failed or was skipped before it had any."""
        nodeid = bare_nodeid(report.nodeid)
        cell = getattr(report, "fsdp_cell", None)
        if cell is not None:
            self.models[nodeid.rpartition("::")[0]] = cell[0]
        if (text := getattr(report, "fsdp_rows", None)) is not None:
            rows = unpack(text)
            for row in rows:
                row.extra["item"] = nodeid
            self.store.items[nodeid] = rows
        elif not report.passed and (cell := cell or self._guess(nodeid)):
            # a worker that died, a broken fixture, a skip by the user's mark: still a row
            model_type, test, variant = cell
            row = error_row(model_type, test, variant, self.backend, _why(report))
            if report.skipped:
                row.outcome = "skipped"
            row.extra["item"] = nodeid
            self.store.missing[nodeid] = row

    def _guess(self, nodeid: str) -> tuple[str, str, str] | None:
        """Return the cell of an item that only its node id is known of: that of a worker that died."""
        if (owner := scope_of(nodeid)) is None:
            return None
        from fsdp_testkit.plugin.mixin import ALL_METHODS

        method = nodeid.rpartition("::")[2]
        model_type = self.models.get(owner, owner.rpartition("::")[2])
        return (model_type, *ALL_METHODS[method]) if method in ALL_METHODS else None


def pack(rows: Iterable[Result]) -> str:
    """Return rows as JSON text; numbers of numpy are written as plain ones."""

    def plain(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    return json.dumps([row.to_dict() for row in rows], default=plain)


def unpack(text: str) -> list[Result]:
    """Return the rows that `pack` wrote."""
    return [Result(**raw) for raw in json.loads(text)]


def bare_nodeid(nodeid: str) -> str:
    """Return the node id without the group that ``--dist loadgroup`` appends."""
    head, _, name = nodeid.rpartition("::")
    return f"{head}::{name.split('@')[0]}" if head else nodeid


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return text.strip() or "the item ended without a result"
