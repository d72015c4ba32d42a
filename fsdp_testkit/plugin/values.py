"""Values on their way from the parent to a rank: JSON, with tuples, paths and torch's dtypes marked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from fsdp_testkit.core.errors import UsageError

_MARK = "$fsdp_testkit"


class PerRank:
    """One value for each rank, see `per_rank`.

    Attributes:
        values: by rank.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = list(values)

    def __repr__(self) -> str:
        return f"per_rank({self.values!r})"


def per_rank(values: Iterable[Any]) -> PerRank:
    """Give each rank its own element of ``values``, in place of an argument of a test marked ``ranks``.

    Args:
        values: as many as there are ranks.
    """
    return PerRank(values)


def pack(name: str, value: Any, ranks: int) -> Any:
    """Return ``value`` as JSON data.

    Args:
        name: of the argument, for the message.
        value: what the test function is to get.
        ranks: how many ranks it is for.

    Raises:
        UsageError: the value cannot travel; names the argument and the part.
    """
    if isinstance(value, PerRank):
        if len(value.values) != ranks:
            raise UsageError(f"argument {name} is {value!r}: {len(value.values)} values for {ranks} ranks"[:500])
        return {_MARK: "per_rank", "value": [pack(f"{name}[{i}]", item, ranks) for i, item in enumerate(value.values)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [pack(f"{name}[{index}]", item, ranks) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {_MARK: "tuple", "value": [pack(f"{name}[{index}]", item, ranks) for index, item in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        packed = {key: pack(f"{name}[{key!r}]", item, ranks) for key, item in value.items()}
        return {_MARK: "dict", "value": packed} if _MARK in packed else packed
    if isinstance(value, PurePath):
        return {_MARK: "path", "value": str(value)}
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return {_MARK: "dtype", "value": str(value).removeprefix("torch.")}
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise UsageError(
        f"argument {name} is of type {kind}, which cannot be sent to ranks: they get None, booleans, numbers, text, "
        "paths, dtypes, and lists, tuples and dicts (with text as keys) of them. Make other values in the test function"
    )


def unpack(value: Any, rank: int) -> Any:
    """Return the value that `pack` was given, as ``rank`` is to see it."""
    if isinstance(value, list):
        return [unpack(item, rank) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value or set(value) != {_MARK, "value"}:
        return {key: unpack(item, rank) for key, item in value.items()}
    inner = value["value"]
    match value[_MARK]:
        case "per_rank":
            return unpack(inner[rank], rank)
        case "tuple":
            return tuple(unpack(item, rank) for item in inner)
        case "path":
            return Path(inner)
        case "dtype":
            return getattr(importlib.import_module("torch"), inner)
    return {key: unpack(item, rank) for key, item in inner.items()}
