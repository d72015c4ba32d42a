"""``--fsdp-shard 3/8``: one of several machines' part of the matrix, balanced by an earlier report's durations.

All items of a model stay together. The parts are complete and disjoint: every machine computes the same
split from the same items and the same file.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.plugin.items import CELL
from fsdp_testkit.plugin.options import usage_errors


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--fsdp-shard`` and ``--fsdp-durations``."""
    group = parser.getgroup("fsdp", "distributed correctness (fsdp_testkit)")
    text = "run the I-th of N parts of the models, for example 3/8"
    group.addoption("--fsdp-shard", dest="fsdp_shard", metavar="I/N", default=None, help=text)
    text = "an earlier --fsdp-report, whose seconds balance the parts"
    group.addoption("--fsdp-durations", dest="fsdp_durations", metavar="FILE.json", default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse wrong values before anything is collected."""
    with usage_errors():
        if config.getoption("fsdp_shard") is not None:
            parse_shard(config.getoption("fsdp_shard"))
        if config.getoption("fsdp_durations") is not None:
            seconds_of(config.invocation_params.dir / config.getoption("fsdp_durations"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the models of the other parts; items that are no FSDP tests stay everywhere."""
    if config.getoption("fsdp_shard") is None:
        return
    index, count = parse_shard(config.getoption("fsdp_shard"))
    file = config.getoption("fsdp_durations")
    seconds = seconds_of(config.invocation_params.dir / file) if file is not None else {}
    models = {item.stash[CELL].model_type for item in items if CELL in item.stash}
    mine = split(sorted(models), seconds, count)[index - 1]
    kept = [item for item in items if CELL not in item.stash or item.stash[CELL].model_type in mine]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def parse_shard(text: str) -> tuple[int, int]:
    """Return (index from 1, count).

    Raises:
        UsageError: not of the form I/N with 1 <= I <= N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise UsageError(f"--fsdp-shard={text!r} must look like 3/8, with the first number from 1 to the second")
    return index, count


def split(models: list[str], seconds: Mapping[str, float], count: int) -> list[set[str]]:
    """Split models into ``count`` parts of about equal duration: longest first, to the emptiest part.

    A model without a duration counts as the median one.
    """
    known = [seconds[model] for model in models if model in seconds]
    usual = statistics.median(known) if known else 1.0
    parts: list[set[str]] = [set() for _ in range(count)]
    loads = [0.0] * count
    for model in sorted(models, key=lambda name: (-seconds.get(name, usual), name)):
        target = loads.index(min(loads))
        parts[target].add(model)
        loads[target] += seconds.get(model, usual)
    return parts


def seconds_of(path: Path) -> dict[str, float]:
    """Return model type -> seconds over all rows of a report.

    Raises:
        UsageError: the file is missing or is no report.
    """
    from fsdp_testkit.reporting.report import read_report

    totals: dict[str, float] = {}
    for row in read_report(path)["results"]:
        totals[row["model_type"]] = totals.get(row["model_type"], 0.0) + float(row["seconds"])
    return totals
