"""Items: the matrix becomes classes, FSDP items get their marks and the words that -k finds them by."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from fsdp_testkit.models.families import FAMILY_NAMES, family_of
from fsdp_testkit.plugin.options import RUN_OPTIONS, usage_errors

MARKERS = {
    "fsdp": "a distributed correctness test of fsdp_testkit",
    # transformers' own name for its own tests, so that one -m selects both
    "is_fsdp_test": "a test of sharded training",
    "fsdp_deadline(seconds)": "time limit of one job on the ranks, instead of --fsdp-deadline",
    **{name: f"a test of a model of this family: {text}" for name, text in FAMILY_NAMES.items()},
    "ranks(count, *, device, comm)": "run the test function on that many ranks; it may take rank and world_size",
}


class Cell(NamedTuple):
    """Where an item lies in the matrix."""

    model_type: str
    test: str
    variant: str


CELL = pytest.StashKey[Cell]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that nobody else has registered."""
    present = {line.split(":")[0].split("(")[0].strip() for line in config.getini("markers")}
    for name, text in MARKERS.items():
        if name.split("(")[0] not in present:
            config.addinivalue_line("markers", f"{name}: {text}")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Item | pytest.Collector] | None:
    """Replace a `ModelMatrix` by one class per selected model; never collect the mixin itself."""
    # told by attribute, so that sessions without FSDP tests do not import the mixin
    if isinstance(obj, type):
        if obj.__dict__.get("_fsdp_kit_role") == "mixin":
            return []
        if (follow := getattr(obj, "_fsdp_kit_follow", None)) is not None:
            follow(collector.config.stash[RUN_OPTIONS].tier)
        return None
    if getattr(type(obj), "_fsdp_kit_role", None) != "matrix":
        return None
    matrix: Any = obj
    with usage_errors():
        options = collector.config.stash[RUN_OPTIONS]
        classes = matrix.classes(options.models, collector.obj.__name__)
    nodes: list[pytest.Item | pytest.Collector] = []
    for cls in classes:
        if hasattr(collector.obj, cls.__name__):
            raise pytest.UsageError(f"{name}: the module already holds {cls.__name__!r}; rename that class")
        cls._fsdp_kit_follow(options.tier)
        node = pytest.Class.from_parent(collector, name=cls.__name__)
        # the class is no attribute of the module, so that every session can select other models
        node.obj = cls
        nodes.append(node)
    return nodes


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark FSDP items, let ``-k`` find the model type, and group the items of a model for xdist."""
    if not isinstance(item, pytest.Function) or item.cls is None:
        return
    methods = getattr(item.cls, "_fsdp_kit_methods", None)
    if methods is None or item.originalname not in methods:
        return
    model = item.cls._fsdp_kit_model_name()
    item.stash[CELL] = Cell(model, *methods[item.originalname])
    family = family_of(model)
    for name in ("fsdp", "is_fsdp_test", *((family,) if family in FAMILY_NAMES else ())):
        if item.get_closest_marker(name) is None:
            item.add_marker(name)
    # TestModernbertDecoder is found by modernbert-decoder and by modernbert_decoder
    item.extra_keyword_matches.update({model, model.replace("-", "_")})
    if item.config.pluginmanager.hasplugin("xdist") and item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(model))
