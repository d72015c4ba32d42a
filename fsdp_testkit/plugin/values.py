"""Values on their way from the parent to a rank: JSON, with tuples, paths and torch's dtypes marked."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePath
from typing import Any

from fsdp_testkit.core.errors import UsageError

_MARK = "$fsdp_testkit"


def pack(name: str, value: Any) -> Any:
    """Return ``value`` as JSON data.

    Args:
        name: of the argument, for the message.
        value: what the test function is to get.

    Raises:
        UsageError: the value cannot travel; names the argument and the part.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [pack(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {_MARK: "tuple", "value": [pack(f"{name}[{index}]", item) for index, item in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        packed = {key: pack(f"{name}[{key!r}]", item) for key, item in value.items()}
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


def unpack(value: Any) -> Any:
    """Return the value that `pack` was given."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value or set(value) != {_MARK, "value"}:
        return {key: unpack(item) for key, item in value.items()}
    inner = value["value"]
    match value[_MARK]:
        case "tuple":
            return tuple(unpack(item) for item in inner)
        case "path":
            return Path(inner)
        case "dtype":
            return getattr(importlib.import_module("torch"), inner)
    return {key: unpack(item) for key, item in inner.items()}
