"""What a piece of code does to the environment variables of its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any


class EnvironmentChanges:
    """Environment variables that were changed inside the block of `watching_environment`.

    Attributes:
        values: name -> the values that it was given, in turn; ``None`` where it was removed.
        left: names whose value at the end of the block is not what it was.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[str | None]] = {}
        self.left: list[str] = []
        self._before = dict(os.environ)

    def end(self) -> None:
        """Compare with the beginning."""
        after = dict(os.environ)
        names = self._before.keys() | after.keys()
        self.left = sorted(name for name in names if self._before.get(name) != after.get(name))

    def facts(self, names: Any = ()) -> dict[str, Any]:
        """Return plain data: what was changed and left, and the values of ``names`` alone, as others may be secret."""
        return {
            "changed": sorted(self.values),
            "left": self.left,
            "values": {name: self.values[name] for name in names if name in self.values},
        }


@contextlib.contextmanager
def watching_environment() -> Iterator[EnvironmentChanges]:
    """Note every change that is made through ``os.environ`` in the block."""
    changes = EnvironmentChanges()
    kind: Any = type(os.environ)
    set_item, delete = kind.__setitem__, kind.__delitem__

    def noted_set(self: Any, name: str, value: str) -> None:
        set_item(self, name, value)
        changes.values.setdefault(name, []).append(value)

    def noted_delete(self: Any, name: str) -> None:
        delete(self, name)
        changes.values.setdefault(name, []).append(None)

    kind.__setitem__, kind.__delitem__ = noted_set, noted_delete
    try:
        yield changes
    finally:
        kind.__setitem__, kind.__delitem__ = set_item, delete
        changes.end()
