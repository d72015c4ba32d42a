"""The pytest11 entry point. Imports nothing: the parts below are loaded by pytest, each with its own concern."""

from __future__ import annotations

pytest_plugins = ()
