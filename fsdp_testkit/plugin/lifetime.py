"""The engine's lifetime: one per process, made by the first FSDP item, closed when the session ends."""

from __future__ import annotations

import pytest

from fsdp_testkit.engine.ledger import Ledger
from fsdp_testkit.plugin import hooks
from fsdp_testkit.plugin.options import RUN_OPTIONS, EngineOptions, usage_errors
from fsdp_testkit.plugin.session import EngineLike, KitSession, own_engine

SESSION = pytest.StashKey[KitSession]()


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
    # after everything else, also where the session ended by an error of another plugin
    config.add_cleanup(session.close)


@pytest.hookimpl(trylast=True)
def pytest_fsdp_make_engine(options: EngineOptions) -> EngineLike:
    """Make the kit's own engine where no conftest brings another."""
    return own_engine(options)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the ranks before anything is summed up."""
    if (kit := session.config.stash.get(SESSION, None)) is not None:
        kit.close()
