"""The matrix of models x tests for a terminal: from result rows to lines of marked-up segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdp_testkit.core.result import BAD_OUTCOMES, Result
from fsdp_testkit.reporting.failure import number, title

#: Outcome -> (sign, colour), the worst first: a cell over several layouts shows the worst of them.
SIGNS: dict[str, tuple[str, str]] = {
    "error": ("E", "red"),
    "failed": ("F", "red"),
    "xpassed": ("X", "red"),
    "xfailed": ("x", "yellow"),
    "passed": (".", "green"),
    "skipped": ("s", "yellow"),
    "not_applicable": ("-", "light"),
}
#: Up to so many models every one has its line; above, the lines of models without anything to see are folded.
ALL_LINES = 40
_SHORT = {
    "sharding_structure": "struct",
    "buffers_dtypes": "buffers",
    "auto_vs_ddp": "auto",
    "manual_vs_ddp": "manual",
    "hsdp_vs_ddp": "hsdp",
    "save_load": "save",
    "meta_init": "meta",
    "accumulation": "accum",
    "mesh_shapes": "mesh",
    "adapters": "adapt",
    "checkpointing": "ckpt",
    "evaluation": "eval",
    "mixed_precision": "mixed",
    "cpu_offload": "offl",
    "idle_experts": "idle",
    "repeated_saving": "again",
    "offloaded_save": "offsave",
    "save_over": "over",
    "reshard_resume": "reshard",
    "lone_save": "lone",
}
_VARIANTS = ("untied", "tied", "default")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a line and its colour (a name that pytest's terminal writer knows), or ``""``."""

    text: str
    colour: str = ""


Line = list[Segment]


def matrix_lines(rows: Sequence[Result], *, order: Sequence[str] = (), verbose: bool = False) -> list[Line]:
    """Return the matrix, its legend, the reasons of what was not applicable, and the totals.

    Args:
        rows: the rows to show.
        order: names of tests in the order of the columns; others follow.
        verbose: give every model its line.
    """
    lines: list[Line] = []
    backends = list(dict.fromkeys(row.backend for row in rows))
    for backend in backends:
        part = [row for row in rows if row.backend == backend]
        if len(backends) > 1:
            lines.append([Segment(f"backend {backend}")])
        lines.extend(_table(part, order, verbose))
        lines.append([])
    lines.extend(_reasons(rows))
    lines.extend(total_lines(rows))
    return lines


def total_lines(rows: Sequence[Result]) -> list[Line]:
    """Return the counts of models, rows, checks and tensors, and the largest error within all comparisons."""
    counts = {name: sum(row.outcome == name for row in rows) for name in SIGNS}
    parts = [
        Segment(f"{count} {name.replace('_', ' ')}", SIGNS[name][1] if name != "not_applicable" else "")
        for name, count in counts.items()
        if count
    ]
    models = len({row.model_type for row in rows})
    first: Line = [Segment(f"{models} model{_s(models)}, {len(rows)} row{_s(len(rows))}: ")]
    for index, part in enumerate(parts):
        first.extend([Segment(", "), part] if index else [part])
    checks, tensors = sum(row.checks for row in rows), sum(row.tensors for row in rows)
    text = f"{checks} check{_s(checks)}, {tensors} tensor{_s(tensors)} compared"
    # neither a failed row's error nor one that only float64 could judge says how close the healthy ones are
    measured = [
        row
        for row in rows
        if row.outcome == "passed" and row.max_rel_error is not None and not row.extra.get("rounding")
    ]
    if measured:
        worst = max(measured, key=lambda row: row.max_rel_error or 0.0)
        bound = f" (tolerance {number(worst.tolerance)})" if worst.tolerance is not None else ""
        text += f"; largest relative error that passed {number(worst.max_rel_error)}{bound}"
        if worst.max_rel_error:
            text += f", {title(worst)} on {worst.layout}"
    lines = [first, [Segment(text)]]
    for undecided, why in ((False, "as float64 shows"), (True, "by truth's own spread: the model runs in no float64")):
        rounded = [row for row in rows if row.extra.get("rounding") and ("no_fp64" in row.extra) == undecided]
        if not rounded:
            continue
        worst = max(rounded, key=lambda row: row.max_rel_error or 0.0)
        text = f"{len(rounded)} row{_s(len(rounded))} with rounding only, {why}"
        if worst.max_rel_error is not None:
            text += f"; the largest relative error was {number(worst.max_rel_error)}"
        lines.append([Segment(f"{text}, {title(worst)} on {worst.layout}")])
    return lines


def _table(rows: Sequence[Result], order: Sequence[str], verbose: bool) -> list[Line]:
    columns = _columns(rows, order)
    cells: dict[tuple[str, str, str], str] = {}
    ranks = {name: rank for rank, name in enumerate(SIGNS)}
    for row in rows:
        key = (row.model_type, row.test, row.variant)
        if key not in cells or ranks[row.outcome] < ranks[cells[key]]:
            cells[key] = row.outcome
    models = sorted({row.model_type for row in rows})  # workers end in any order
    shown = models if verbose or len(models) <= ALL_LINES else _notable(models, cells)
    width = max([len("model"), *(len(name) for name in shown)])
    lines = _header(columns, width)
    for model in shown:
        line = [Segment(model.ljust(width))]
        for test, variants in columns.items():
            line.append(Segment("  "))
            for index, variant in enumerate(variants):
                sign, colour = SIGNS.get(cells.get((model, test, variant), ""), (" ", ""))
                line.extend([Segment(" " if index else ""), Segment(sign, colour)])
            line.append(Segment(" " * (_width(test, variants) - (2 * len(variants) - 1))))
        lines.append(line)
    if folded := len(models) - len(shown):
        lines.append([Segment(f"... and {folded} more models without a failure (-v shows them)")])
    outcomes = [name for name in SIGNS if name in cells.values()]
    legend = "  ".join(f"{SIGNS[name][0]} {name.replace('_', ' ')}" for name in reversed(outcomes))
    return [*lines, [], [Segment(legend)]]


def _columns(rows: Iterable[Result], order: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.test, set()).add(row.variant)
    places = {name: place for place, name in enumerate(order)}
    tests = sorted(found, key=lambda name: places.get(name, len(places)))
    known = {name: place for place, name in enumerate(_VARIANTS)}
    return {test: sorted(found[test], key=lambda name: (known.get(name, 9), name)) for test in tests}


def _header(columns: dict[str, list[str]], width: int) -> list[Line]:
    names = "model".ljust(width)
    marks = " " * width
    for test, variants in columns.items():
        names += "  " + short_name(test).ljust(_width(test, variants))
        letters = " ".join(variant[0] if variants != ["default"] else " " for variant in variants)
        marks += "  " + letters.ljust(_width(test, variants))
    head: list[Line] = [[Segment(names.rstrip())]]
    if marks.strip():
        present = {variant for variants in columns.values() for variant in variants}
        words = ", ".join(f"{name[0]} {name}" for name in _VARIANTS[:2] if name in present)
        head.append([Segment(f"{marks.rstrip()}   ({words})" if words else marks.rstrip())])
    return head


def short_name(test: str) -> str:
    """Return the name of a test as it heads its column."""
    return _SHORT.get(test, test)


def _width(test: str, variants: Sequence[str]) -> int:
    return max(len(short_name(test)), 2 * len(variants) - 1)


def _notable(models: Iterable[str], cells: dict[tuple[str, str, str], str]) -> list[str]:
    plain = {"passed", "not_applicable", "skipped"}
    loud = {model for (model, _, _), outcome in cells.items() if outcome not in plain}
    return [model for model in models if model in loud]


def _reasons(rows: Iterable[Result]) -> list[Line]:
    """Return why rows were not applicable, were skipped, or are known failures: one line per reason."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.outcome in BAD_OUTCOMES or row.outcome == "passed":
            continue
        key = (row.outcome, row.reason or "no reason given")
        groups.setdefault(key, {})[row.model_type] = None
        counts[key] = counts.get(key, 0) + 1
    lines: list[Line] = []
    for (outcome, reason), models in groups.items():
        names = list(models)
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append([Segment(f"{SIGNS[outcome][0]} {reason} ({counts[outcome, reason]}: {listed})")])
    return [*lines, []] if lines else []


def _s(count: int) -> str:
    return "" if count == 1 else "s"
