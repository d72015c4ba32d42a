"""Hooks that the plugin adds, so that a conftest can take part without patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fsdp_testkit.plugin.options import EngineOptions
    from fsdp_testkit.plugin.session import EngineLike


@pytest.hookspec(firstresult=True)
def pytest_fsdp_make_engine(config: pytest.Config, options: EngineOptions) -> EngineLike | None:
    """Return the engine of this process.

    Called when the first FSDP item runs, and again where a class asks for other options; the engine before it
    is closed first. The kit's own engine is made where no hook returns one.
    """
