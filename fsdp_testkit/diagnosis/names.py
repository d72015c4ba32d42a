"""Many parameter names as few patterns: ``model.layers.*.q_proj.weight``."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Patterns that are shown; more are counted.
SHOWN = 3


def patterns(names: Iterable[str]) -> list[str]:
    """Return the names as patterns, in the order of first appearance.

    Numbers that differ become ``*``. Where names then share their first three parts and more than two are left,
    what follows becomes ``*`` too: a whole block is one pattern.
    """
    unique = list(dict.fromkeys(name for name in names if name))
    by_shape: dict[str, list[str]] = {}
    for name in unique:
        by_shape.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    merged = [group[0] if len(group) == 1 else _common(group) for group in by_shape.values()]
    by_block: dict[str, list[str]] = {}
    for name in merged:
        by_block.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return [
        pattern
        for block, group in by_block.items()
        for pattern in ([f"{block}.*"] if len(group) > 2 and block.count(".") == 2 else group)
    ]


def short(names: Iterable[str]) -> str:
    """Return the patterns of the names as one text: up to `SHOWN` of them, in backticks, and how many more."""
    found = patterns(names)
    text = ", ".join(f"`{pattern}`" for pattern in found[:SHOWN])
    return f"{text} and {len(found) - SHOWN} more" if len(found) > SHOWN else text


def ranks_text(ranks: Iterable[int], world: int) -> str:
    """Return ``every rank``, ``rank 1`` or ``ranks 0, 2``."""
    some = sorted(set(ranks))
    if world > 1 and len(some) == world:
        return "every rank"
    return f"rank{'s' if len(some) != 1 else ''} {', '.join(map(str, some))}" if some else ""


def _common(names: list[str]) -> str:
    """Return the names' pattern: parts that differ are ``*``."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)
