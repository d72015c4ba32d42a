"""The ledger: the dated list of known failures, one entry per cause. Pure apart from reading the files.

An entry claims the cells (model, test, variant, layout, backend) that its lists match, on the versions it
names. A failure in a claimed cell becomes ``xfailed``; a pass becomes ``xpassed``, which fails, so that an
entry cannot outlive its cause.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result
from fsdp_testkit.core.versions import installed_version

#: Whose fault a known failure may be.
CULPRITS = ("transformers", "torch", "backend", "kit")
_LISTS = ("models", "tests", "variants", "layouts", "backends")
_TEXTS = ("id", "cause", "fault_of", "link", "reproduction", "match")
_NOT_RUN = ("skipped", "not_applicable")
_KEYS = (*_TEXTS, *_LISTS, "versions", "date")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cause of known failures.

    Attributes:
        id: unique name; rows carry it as their ``cause``.
        cause: what is wrong, in a sentence or two.
        date: when the entry was written or last confirmed.
        fault_of: one of `CULPRITS`.
        models, tests, variants, layouts, backends: ``fnmatch`` patterns; ``("*",)`` claims all.
        versions: distribution -> pattern of its version, such as ``5.23.*``.
        link, reproduction: where the cause is reported, or the path of a script that shows it.
        match: regular expression that one finding's message (or the row's reason) has to match.
        source: the file that holds the entry.
    """

    id: str
    cause: str
    date: datetime.date
    fault_of: str
    models: tuple[str, ...] = ("*",)
    tests: tuple[str, ...] = ("*",)
    variants: tuple[str, ...] = ("*",)
    layouts: tuple[str, ...] = ("*",)
    backends: tuple[str, ...] = ("*",)
    versions: Mapping[str, str] = field(default_factory=dict)
    link: str = ""
    reproduction: str = ""
    match: str = ""
    source: str = ""

    def selects(self, row: Result) -> bool:
        """Return whether the row lies in the entry's part of the matrix, whatever its layout."""
        pairs = (
            (self.models, row.model_type),
            (self.tests, row.test),
            (self.variants, row.variant),
            (self.backends, row.backend),
        )
        return self.applies_here() and all(_any(patterns, value) for patterns, value in pairs)

    def claims(self, row: Result) -> bool:
        """Return whether the entry says that this very row fails."""
        return self.selects(row) and _any(self.layouts, row.layout)

    def explains(self, row: Result) -> bool:
        """Return whether the row's failure is the one that the entry means."""
        if not self.match:
            # an error is a failure of the run: only its text can tell whether it is the known one
            return row.outcome == "failed"
        texts = [row.reason, *(str(finding.get("message", "")) for finding in row.findings)]
        return any(re.search(self.match, text) for text in texts)

    def applies_here(self) -> bool:
        """Return whether the installed versions are the ones that the entry names."""
        return all(fnmatchcase(installed_version(name), pattern) for name, pattern in self.versions.items())

    def shorten(self, row: Result) -> str:
        """Return what to do with the entry now that ``row`` passes."""
        cell = f"{row.model_type} / {row.test} / {row.variant} / {row.layout} / {row.backend}"
        steps = []
        for name, value in zip(_LISTS, (row.model_type, row.test, row.variant, row.layout, row.backend), strict=True):
            patterns: tuple[str, ...] = getattr(self, name)
            if value in patterns and len(patterns) > 1:
                steps.append(f"take {value!r} out of {name}")
        repair = " or ".join(steps) if steps else "narrow its lists"
        return (
            f"passed, but ledger entry {self.id!r} in {self.source} says that it fails. If nothing else of "
            f"the entry fails any more, delete the entry; else {repair}, so that it no longer claims {cell}"
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """All entries that apply to a session."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def load(cls, paths: Iterable[Path]) -> Ledger:
        """Read ledger files.

        Raises:
            UsageError: a file is missing or malformed; the message names the file and the entry.
        """
        entries: list[Entry] = []
        for path in dict.fromkeys(paths):
            entries.extend(_read(path))
        sources: dict[str, str] = {}
        for entry in entries:
            if entry.id in sources:
                raise UsageError(
                    f"ledger {entry.source}: entry {entry.id!r} is there twice "
                    f"(also in {sources[entry.id]}): an id must be unique"
                )
            sources[entry.id] = entry.source
        return cls(tuple(entries))

    def apply(self, result: Result) -> Result:
        """Return the row with known failures and unexpected passes marked.

        A failed row that an entry claims and explains becomes ``xfailed``; a passed row that an entry claims
        becomes ``xpassed``; every other row comes back as it is.
        """
        claiming = [entry for entry in self.entries if entry.claims(result)]
        if result.outcome in ("failed", "error"):
            for entry in claiming:
                if entry.explains(result):
                    return replace(result, outcome="xfailed", cause=entry.id, reason=f"{entry.id}: {entry.cause}")
        if result.outcome == "passed" and claiming:
            entry = claiming[0]
            return replace(result, outcome="xpassed", cause=entry.id, reason=entry.shorten(result))
        return result

    def stale(self, results: Iterable[Result], selected: Iterable[str] | None = None) -> list[str]:
        """Return a sentence for each entry that nothing in the run answers to.

        Only what ran is judged. An entry is stale where its model, test, variant and backend did run, and no
        row has a layout that it names; or where all catalogue models were selected, and none has its name.

        Args:
            results: the rows of the run, after `apply`.
            selected: the selected model types where they are all there are, else ``None``.
        """
        rows = list(results)
        everything = None if selected is None else set(selected)
        sentences = []
        for entry in self.entries:
            ran = [row for row in rows if row.outcome not in _NOT_RUN and entry.selects(row)]
            if ran and not any(_any(entry.layouts, row.layout) for row in ran):
                seen = ", ".join(sorted({row.layout for row in ran}))
                problem = f"its layouts {list(entry.layouts)} match none that ran ({seen})"
            elif everything and not any(_any(entry.models, name) for name in everything):
                problem = f"its models {list(entry.models)} match no model type"
            else:
                continue
            where = f"ledger entry {entry.id!r} in {entry.source}"
            sentences.append(f"{where} is stale: {problem}. Correct or delete it")
        return sentences


def _any(patterns: tuple[str, ...], value: str) -> bool:
    return any(value == pattern or fnmatchcase(value, pattern) for pattern in patterns)


def _read(path: Path) -> list[Entry]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"ledger {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"ledger {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"ledger {path} is not TOML: {error}") from None
    if unknown := sorted(raw.keys() - {"entry"}):
        raise UsageError(f"ledger {path}: unknown top-level keys {unknown}; only [[entry]] tables are known")
    tables = raw.get("entry", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"ledger {path}: entries must be written as [[entry]]")
    return [_entry(table, number, str(path)) for number, table in enumerate(tables, start=1)]


def _entry(table: dict[str, Any], number: int, source: str) -> Entry:
    name = repr(table["id"]) if isinstance(table.get("id"), str) and table["id"] else f"number {number}"

    def wrong(text: str) -> UsageError:
        return UsageError(f"ledger {source}, entry {name}: {text}")

    if unknown := sorted(table.keys() - set(_KEYS)):
        raise wrong(f"unknown keys {unknown}; known are {', '.join(_KEYS)}")
    for key in ("id", "cause", "fault_of", "date"):
        if not table.get(key):
            raise wrong(f"{key} is missing")
    for key in _TEXTS:
        if not isinstance(table.get(key, ""), str):
            raise wrong(f"{key}={table[key]!r} must be text")
    if table["fault_of"] not in CULPRITS:
        raise wrong(f"fault_of={table['fault_of']!r} must be one of {', '.join(CULPRITS)}")
    if not (table.get("link") or table.get("reproduction")):
        raise wrong("link or reproduction is missing: a known failure needs a way to see it again")
    values = dict(table)
    for key in _LISTS:
        if key in values:
            values[key] = _patterns(values[key], key, wrong)
    values["date"] = _date(values["date"], wrong)
    versions = values.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(item, str) for item in versions.values()):
        raise wrong(f"versions={versions!r} must be a table such as {{ transformers = '5.23.*' }}")
    try:
        re.compile(values.get("match", ""))
    except re.error as error:
        raise wrong(f"match={values['match']!r} must be a regular expression: {error}") from None
    return Entry(**values, source=source)


def _patterns(value: Any, key: str, wrong: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
        raise wrong(f"{key}={value!r} must be a list of names or patterns; leave it out to claim all")
    return tuple(items)


def _date(value: Any, wrong: Any) -> datetime.date:
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise wrong(f"date={value!r} must be a date such as 2025-07-31") from None
