"""The pytest11 entry point. Imports nothing: pytest loads the parts below, each with its own concern."""

from __future__ import annotations

pytest_plugins = (
    "fsdp_testkit.plugin.options",
    "fsdp_testkit.plugin.lifetime",
    "fsdp_testkit.plugin.header",
    "fsdp_testkit.plugin.items",
    "fsdp_testkit.plugin.rows",
    "fsdp_testkit.plugin.summary",
)
