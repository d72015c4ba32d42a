"""How xdist hands out items: all items of a model class to one worker, because they share one engine's work.

Two faults of xdist 3.8.0 make a scheduler of our own necessary. With pytest 9.2 its ``--dist loadgroup`` groups
nothing (pytest-xdist issue 1386). And when a worker dies, it queues what was finished once more and keeps a
replacement waiting for a second item, so that the session never ends (issues 1323, 1327 and 1378).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from fsdp_testkit.plugin.options import RUN_OPTIONS
from fsdp_testkit.ranks.slots import cores
from fsdp_testkit.reporting.counts import read_counts


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Choose ``--dist loadgroup`` where the user gave ``-n`` and no ``--dist``.

    A wrapper, because it has to come before xdist's own hook, which turns the missing choice into ``load``.
    """
    option = config.option
    asked = getattr(option, "numprocesses", None)
    if asked and getattr(option, "dist", None) == "no" and not getattr(option, "distload", False):
        option.dist = "loadgroup"
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler for ``--dist loadgroup``; any other choice is left to xdist."""
    if config.getvalue("dist") != "loadgroup":
        return None
    return _make_scheduler(config, log)


def scope_of(nodeid: str) -> str | None:
    """Return the class of an FSDP item, ``None`` for any other item."""
    match = re.fullmatch(r"(.+)::test_kit_\w+", nodeid)
    return match.group(1) if match else None


def superfluous(config: pytest.Config, items: Sequence[str], workers: int) -> int:
    """Return how many workers of a session would only take time from the others.

    Each worker that runs models has a rank server of its own, which takes seconds to start, and its ranks keep a core
    busy. That is known of sessions that have nothing but models on this machine's cores.
    """
    options = config.stash[RUN_OPTIONS]
    if not items or options.hosts or options.engine.device != "cpu" or not all(map(scope_of, items)):
        return 0
    return max(0, workers - cores())


def sizes_of(config: pytest.Config) -> dict[str, int]:
    """Return class of the matrix -> recorded number of tensors that its tests compare; time goes with it."""
    from fsdp_testkit.plugin.matrix import class_name  # which needs this module

    options = config.stash[RUN_OPTIONS]
    if options.counts is None:
        return {}
    recorded = read_counts(options.counts).get(options.engine.backend, {})
    return {class_name(model): sum(numbers[2] for numbers in tests.values()) for model, tests in recorded.items()}


def _make_scheduler(config: pytest.Config, log: Any) -> Any:
    # xdist is an extra: it is imported only where it is in use
    from xdist.scheduler import LoadGroupScheduling

    sizes = sizes_of(config)

    class ModelScheduling(LoadGroupScheduling):  # type: ignore[misc]  # xdist's classes are untyped here
        """Groups as usual, FSDP items by class, on no more workers than have a core; goes on when a worker has died."""

        def schedule(self) -> None:
            """Send workers home that would have no core to themselves, then distribute."""
            if self.collection is None:
                first = next(iter(self.registered_collections.values()))
                for _ in range(superfluous(config, first, len(self.nodes))):
                    self.assigned_work.popitem()[0].shutdown()
            super().schedule()

        def _split_scope(self, nodeid: str) -> str:
            scope: str = scope_of(nodeid) or super()._split_scope(nodeid)
            return scope

        def _assign_work_unit(self, node: Any) -> None:
            """Take the largest model first: at the end of the session workers then wait for a small one, if at all."""
            if sizes:
                scopes = {scope: sizes.get(scope.rpartition("::")[2], 0) for scope in self.workqueue}
                self.workqueue.move_to_end(max(scopes, key=scopes.__getitem__), last=False)
            super()._assign_work_unit(node)

        def remove_node(self, node: Any) -> str | None:
            """Take back what a dead worker had not finished; return the item that it died in."""
            workload = self.assigned_work.pop(node)
            crashed: str | None = None
            for scope, unit in workload.items():
                for nodeid, done in unit.items():
                    if not done and crashed is None:
                        crashed = nodeid
                        # it has its verdict; once more it would take the next worker with it
                        unit[nodeid] = True
                if not all(unit.values()):
                    self.workqueue[scope] = unit
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

        def _reschedule(self, node: Any) -> None:
            """Give a worker enough to go on with, or tell it that nothing will come."""
            # a replacement is asked before it has collected
            if node.shutting_down or node not in self.registered_collections:
                return
            # a worker starts an item only when it knows the next one
            while self.workqueue and self._pending_of(self.assigned_work[node]) <= 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()

    return ModelScheduling(config, log)
