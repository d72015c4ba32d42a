"""The engine's lifetime: one per process, made by the first FSDP item, closed when the session ends."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.engine.ledger import Ledger
from fsdp_testkit.plugin import hooks
from fsdp_testkit.plugin.hosts import session_hosts
from fsdp_testkit.plugin.options import RUN_OPTIONS, EngineOptions, is_worker, usage_errors
from fsdp_testkit.plugin.session import EngineLike, KitSession, own_engine
from fsdp_testkit.plugin.slots import session_slots

SESSION = pytest.StashKey[KitSession]()
#: What went wrong while engines were closed.
CLOSING = pytest.StashKey[list[str]]()
_CLOSING = "fsdp_testkit_closing"


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the kit's own hooks."""
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the session's `KitSession`; this starts nothing."""

    def make_engine(options: EngineOptions) -> EngineLike:
        engine: EngineLike = config.hook.pytest_fsdp_make_engine(config=config, options=options)
        return engine

    options = config.stash[RUN_OPTIONS]
    with usage_errors():
        ledger = Ledger.load(options.ledgers)
    session = KitSession(options.engine, ledger, make_engine)
    config.stash[SESSION] = session
    config.stash[CLOSING] = []
    # after everything else, also where the session ended by an error of another plugin
    config.add_cleanup(session.close)


@pytest.hookimpl(trylast=True)
def pytest_fsdp_make_engine(config: pytest.Config, options: EngineOptions) -> EngineLike:
    """Make the kit's own engine where no conftest brings another."""
    return own_engine(options, session_slots(config), session_hosts(config))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the ranks before anything is summed up; trouble with that must not cost the report."""
    config = session.config
    if (kit := config.stash.get(SESSION, None)) is None:
        return
    try:
        kit.close()
    except Exception as error:  # an engine may be anybody's
        text = f"the engine could not be closed: {type(error).__name__}: {error}"
        config.stash[CLOSING].append(text)
        if is_worker(config):
            config.workeroutput[_CLOSING] = text  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what an xdist worker had to say about closing its engine."""
    if text := (getattr(node, "workeroutput", None) or {}).get(_CLOSING):
        node.config.stash[CLOSING].append(text)
