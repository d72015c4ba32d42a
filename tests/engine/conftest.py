"""An engine for the tests of a module; tests that look into one take `fresh_engine`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fsdp_testkit.engine.engine import Engine, Settings


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Settings())
    yield engine
    engine.close()


@pytest.fixture
def fresh_engine() -> Iterator[Engine]:
    engine = Engine(Settings())
    yield engine
    engine.close()
