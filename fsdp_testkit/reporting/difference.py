"""What changed between two reports, as Markdown for a job's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fsdp_testkit.core.result import BAD_OUTCOMES, OUTCOMES, Result

#: Changed rows that are listed; the rest is counted.
SHOWN = 50


def difference_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return Markdown: outcomes then and now, and the rows whose outcome changed, those that are bad now first.

    Args:
        before: a report, as `read_report` returns it.
        after: the later one.
    """
    old, new = _rows(before["results"]), _rows(after["results"])
    lines = [*_versions(before, after), "| outcome | before | after |", "|---|---|---|"]
    then, now = Counter(row.outcome for row in old.values()), Counter(row.outcome for row in new.values())
    lines += [f"| {name} | {then[name]} | {now[name]} |" for name in OUTCOMES if then[name] or now[name]]
    changed = [(key, row) for key, row in new.items() if key in old and old[key].outcome != row.outcome]
    changed.sort(key=lambda pair: (pair[1].outcome not in BAD_OUTCOMES, pair[0]))
    lines += [
        "",
        f"{len(changed)} rows changed, {len(new.keys() - old.keys())} new, {len(old.keys() - new.keys())} gone.",
    ]
    if changed:
        lines += ["", "| model | test | layout | before | after | reason |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.model_type} | {row.test} {row.variant} | {row.layout} | {old[key].outcome} | {row.outcome} "
            f"| {_one_line(row.reason)} |"
            for key, row in changed[:SHOWN]
        ]
        if len(changed) > SHOWN:
            lines += ["", f"and {len(changed) - SHOWN} more"]
    return lines


def _rows(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], Result]:
    rows = [Result(**raw) for raw in results]
    return {(row.backend, row.model_type, row.test, row.variant, row.layout): row for row in rows}


def _versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = ("fsdp_testkit", "torch", "transformers")
    moved = [
        f"{name} {before['environment'].get(name)} -> {after['environment'].get(name)}"
        for name in names
        if before["environment"].get(name) != after["environment"].get(name)
    ]
    return [f"Versions: {', '.join(moved)}", ""] if moved else []


def _one_line(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 160 else f"{flat[:157]}..."
