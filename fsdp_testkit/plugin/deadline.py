"""The marker ``@pytest.mark.fsdp_deadline(120)``."""

from __future__ import annotations

import pytest

from fsdp_testkit.plugin.options import deadline, usage_errors


def marked_deadline(item: pytest.Item) -> float | None:
    """Return the seconds of the closest marker, ``None`` where there is none."""
    if (mark := item.get_closest_marker("fsdp_deadline")) is None:
        return None
    given = [*mark.args, *mark.kwargs.values()]
    if len(given) != 1 or mark.kwargs.keys() - {"seconds"}:
        raise pytest.UsageError(f"fsdp_testkit: @pytest.mark.fsdp_deadline{mark.args} must have one argument: seconds")
    with usage_errors():
        return deadline("@pytest.mark.fsdp_deadline", given[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse wrong markers before anything runs."""
    for item in items:
        marked_deadline(item)
