"""The pytest11 entry point: registers the parts of the plugin, each with its own concern."""

from __future__ import annotations

import importlib

import pytest

PARTS = (
    "options",
    "slots",
    "hosts",
    "deadline",
    "ranks_marker",
    "lifetime",
    "header",
    "items",
    "scheduling",
    "company",
    "sharding",
    "rows",
    "summary",
)


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the parts; hooks that were called before are called for them again.

    A ``pytest_plugins`` list would do the same, and warn in sessions that have imported the kit before.
    """
    for part in PARTS:
        name = f"{__package__}.{part}"
        if not pluginmanager.hasplugin(name):
            pluginmanager.register(importlib.import_module(name), name)
