"""How much each test has looked at: a run that compares less than the one before fails, although nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result

SCHEMA = "fsdp_testkit counts 1"
#: backend -> model type -> "test variant" -> [rows, checks, compared tensors].
Counts = dict[str, dict[str, dict[str, list[int]]]]
_SETTLED = {"passed", "not_applicable"}


def count(rows: Iterable[Result]) -> Counts:
    """Return the counts of the tests whose rows all passed or were not applicable.

    A row that had rounding is left out: it was judged once more in float64, and not by a DDP run that rounds itself.
    """
    cells: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        cells.setdefault((row.backend, row.model_type, f"{row.test} {row.variant}"), []).append(row)
    counts: Counts = {}
    for (backend, model, name), mine in sorted(cells.items()):
        if {row.outcome for row in mine} <= _SETTLED and not any(row.extra.get("rounding") for row in mine):
            numbers = [len(mine), sum(row.checks for row in mine), sum(row.tensors for row in mine)]
            counts.setdefault(backend, {}).setdefault(model, {})[name] = numbers
    return counts


def fallen(found: Counts, recorded: Counts) -> list[str]:
    """Return one line for each test that looked at less than is recorded; tests that did not run do not count."""
    lines = []
    for backend, models in found.items():
        for model, tests in models.items():
            for name, numbers in tests.items():
                before = recorded.get(backend, {}).get(model, {}).get(name)
                if before is None:
                    continue
                less = [
                    f"{now} {what} instead of {then}"
                    for what, now, then in zip(("rows", "checks", "compared tensors"), numbers, before, strict=True)
                    if now < then
                ]
                if less:
                    lines.append(f"{model}: {name} with {backend} has {' and '.join(less)}")
    return lines


def vanished(rows: Iterable[Result], recorded: Counts) -> list[str]:
    """Return one line for each test that is recorded for a backend that ran, and has no row: for runs of everything."""
    ran: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        ran.setdefault(row.backend, set()).add((row.model_type, f"{row.test} {row.variant}"))
    return [
        f"{model}: {name} with {backend} did not run, and is recorded"
        for backend, known in ran.items()
        for model, tests in recorded.get(backend, {}).items()
        for name in tests
        if (model, name) not in known
    ]


def read_counts(path: Path) -> Counts:
    """Read what `write_counts` wrote.

    Raises:
        UsageError: the file is missing or something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"counts {path} do not exist; python -m fsdp_testkit counts makes them of a report") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"counts {path} cannot be read: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    counts = document.get("counts") if isinstance(document, dict) else None
    if schema != SCHEMA or not _well_formed(counts):
        raise UsageError(f"counts {path} must be what python -m fsdp_testkit counts writes (schema {SCHEMA!r})")
    return cast("Counts", counts)


def _well_formed(counts: Any) -> bool:
    return isinstance(counts, dict) and all(
        isinstance(models, dict)
        and all(
            isinstance(tests, dict)
            and all(
                isinstance(numbers, list) and len(numbers) == 3 and all(isinstance(n, int) for n in numbers)
                for numbers in tests.values()
            )
            for tests in models.values()
        )
        for models in counts.values()
    )


def text_of(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the counts as JSON with one line for each model, so that changes can be read."""
    parts = []
    for backend, models in sorted(counts.items()):
        lines = ",\n".join(
            f"   {json.dumps(model)}: {json.dumps(tests, sort_keys=True, separators=(',', ':'))}"
            for model, tests in sorted(models.items())
        )
        parts.append(f"  {json.dumps(backend)}: {{\n{lines}\n  }}")
    body = ",\n".join(parts)
    return f'{{\n "schema": {json.dumps(SCHEMA)},\n "counts": {{\n{body}\n }}\n}}\n'
