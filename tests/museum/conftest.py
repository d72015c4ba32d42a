from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "museum: runs faults of the museum; -m museum runs every one")
    config.addinivalue_line("markers", "museum_rest: not in the sample that runs by default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("-m"):
        return
    rest = [item for item in items if item.get_closest_marker("museum_rest")]
    if rest:
        items[:] = [item for item in items if item not in rest]
        config.hook.pytest_deselected(items=rest)
