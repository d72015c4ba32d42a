"""Scoring the museum: run its bugs, in one process or in several, and tell how each one was caught."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.engine.engine import Engine, Settings
from fsdp_testkit.faults import museum
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.bugs import FAMILIES

#: Version of the score's JSON.
SCHEMA = "fsdp_testkit.museum/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one bug fared. A bug that is not real, or was not run, has nothing but its name, families and causes.

    Attributes:
        id: the bug's name.
        thread: where it was reported.
        families: names of its families.
        real: whether it is re-created.
        reason: why it is not, or ``""``.
        expected: the causes that its thread gives it, the first one first.
        hit: whether the fault counted a hit.
        green: whether the same tests pass without the fault.
        caught: green without it, red with it, and for the right reason.
        caught_by: those of the checks that the fault names which had a finding.
        diagnosis: the cause that the kit named first, or ``""``.
        diagnosis_right: whether that is the first one expected; ``None`` where nothing was run.
        ranks: ranks that the findings of those checks name; empty where they concern all ranks.
        seconds: wall time of the runs with the fault.
        missing: what should have been found and was not.
    """

    id: str
    thread: str = ""
    families: tuple[str, ...] = ()
    real: bool = False
    reason: str = ""
    expected: tuple[str, ...] = ()
    hit: bool = False
    green: bool = False
    caught: bool = False
    caught_by: tuple[str, ...] = ()
    diagnosis: str = ""
    diagnosis_right: bool | None = None
    ranks: tuple[int, ...] = ()
    seconds: float = 0.0
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def select(ids: Sequence[str] = (), families: Sequence[str] = ()) -> list[museum.Entry]:
    """Return the entries that have one of the ids and one of the families; an empty filter takes all.

    Args:
        ids: names of bugs.
        families: numbers or names of families, or parts of a name that only one family has.

    Raises:
        UsageError: an unknown id or family, or nothing is left.
    """
    listed = museum.entries()
    known = [entry.bug for entry in listed]
    if unknown := [bug for bug in ids if bug not in known]:
        raise UsageError(f"--id={unknown[0]!r} must be one of {', '.join(known)}")
    numbers = {family_number(family) for family in families}
    chosen = [
        entry
        for entry in listed
        if (not ids or entry.bug in ids) and (not families or numbers.intersection(entry.families))
    ]
    if not chosen:
        raise UsageError(f"no bug is one of {', '.join(ids)} and of the families {', '.join(families)}")
    return chosen


def family_number(text: str) -> int:
    """Return the number of a family given as number, name or unique part of a name.

    Raises:
        UsageError: it is none of these.
    """
    if text.isascii() and text.isdigit() and int(text) in FAMILIES:
        return int(text)
    exact = [number for number, name in FAMILIES.items() if name == text]
    part = [number for number, name in FAMILIES.items() if text and text in name]
    if len(found := exact or part) == 1:
        return found[0]
    known = ", ".join(f"{number} ({name})" for number, name in FAMILIES.items())
    raise UsageError(f"--family={text!r} must be one of {known}")


def unscored(entry: museum.Entry) -> Score:
    """Return what is known of a bug without running it."""
    return Score(
        id=entry.bug,
        thread=entry.thread,
        families=tuple(FAMILIES[number] for number in entry.families),
        real=entry.real,
        reason=entry.reason,
        expected=entry.fault.causes if entry.fault is not None else (),
    )


class Scorer:
    """Runs bugs in this process. What faults of one model and test share is done once, also the run without a fault."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._engine = Engine(settings or Settings())
        self._green: dict[Any, list[str]] = {}

    def close(self) -> None:
        """End the ranks' server and delete all work files."""
        self._engine.close()

    def score(self, bug: str) -> Score:
        """Run one bug, without and with its fault. What breaks in the kit meanwhile is written into ``missing``."""
        entry = next(entry for entry in museum.entries() if entry.bug == bug)
        known = unscored(entry)
        if entry.fault is None:
            return known
        started = time.monotonic()
        try:
            return self._score(known, entry.fault)
        except (EnvironmentLacksError, UsageError):
            raise
        except Exception:  # one bug must not end the others' run
            values = known.to_dict() | {"missing": (traceback.format_exc(),), "diagnosis_right": False}
            return Score(**values | {"seconds": round(time.monotonic() - started, 2)})

    def _score(self, known: Score, fault: type[Fault]) -> Score:
        wrong = self.green(fault)
        started = time.monotonic()
        shown = museum.show(self._engine, fault)
        values = known.to_dict() | {
            "hit": shown.hits > 0,
            "green": not wrong,
            "caught": not wrong and not shown.missing,
            "caught_by": tuple(dict.fromkeys(finding["check"] for finding in shown.found)),
            "diagnosis": shown.diagnosis,
            "diagnosis_right": shown.diagnosis_right,
            "ranks": tuple(sorted({item["rank"] for item in shown.found if item.get("rank") is not None})),
            "seconds": round(time.monotonic() - started, 2),
            "missing": (*wrong, *shown.missing),
        }
        return Score(**values)

    def green(self, fault: type[Fault]) -> list[str]:
        """Return what is wrong with the fault's tests without it; bugs that make the same runs share them."""
        runs = (fault.model, fault.dropout, fault.fields, fault.test, fault.variant, fault.also)
        if runs not in self._green:
            self._green[runs] = museum.green(self._engine, fault)
        return self._green[runs]


def chunks(faults: Iterable[type[Fault]]) -> list[list[str]]:
    """Return bugs grouped by what their runs share, models with most work first."""
    ordered = sorted(faults, key=museum.by_run)
    work: dict[str, float] = {}
    for fault in ordered:
        work[fault.model] = work.get(fault.model, 0.0) + museum.price(fault)
    ordered.sort(key=lambda fault: -work[fault.model])  # keeps the order within a model
    groups = itertools.groupby(ordered, key=lambda fault: museum.by_run(fault)[:4])
    return [[fault.bug for fault in group] for _, group in groups]


def run_scores(
    entries: Sequence[museum.Entry], *, jobs: int = 1, report: Callable[[Score], None] = lambda _: None
) -> list[Score]:
    """Run the real ones of the entries and return the scores of all, in their order.

    Args:
        entries: what `select` returns.
        jobs: processes that run bugs at the same time, each with ranks of its own.
        report: called with each score as it comes in.

    Raises:
        UsageError: ``jobs`` is below 1.
        EnvironmentLacksError: torch or transformers is missing or of an unsupported version; a process died.
    """
    if jobs < 1:
        raise UsageError(f"--jobs={jobs} must be at least 1")
    groups = chunks(entry.fault for entry in entries if entry.fault is not None)
    scores = {entry.bug: unscored(entry) for entry in entries}
    for score in here(groups) if jobs == 1 or len(groups) < 2 else in_processes(groups, min(jobs, len(groups))):
        scores[score.id] = score
        report(score)
    return list(scores.values())


def here(groups: list[list[str]]) -> Iterator[Score]:
    """Yield scores from this process."""
    scorer = Scorer()
    try:
        for bug in itertools.chain.from_iterable(groups):
            yield scorer.score(bug)
    finally:
        scorer.close()


def in_processes(groups: list[list[str]], jobs: int) -> Iterator[Score]:
    """Yield scores from worker processes as they come in."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker) as pool:
        waiting = [pool.submit(_score_group, group) for group in groups]
        try:
            for done in as_completed(waiting):
                yield from done.result()
        except BrokenProcessPool as error:
            raise EnvironmentLacksError(f"a process that ran faults died: {error}") from None
        finally:
            pool.shutdown(cancel_futures=True)


_workers: list[Scorer] = []


def _start_worker() -> None:
    scorer = Scorer()
    _workers.append(scorer)
    Finalize(None, scorer.close, exitpriority=10)  # a worker ends without running atexit


def _score_group(bugs: list[str]) -> list[Score]:
    return [_workers[0].score(bug) for bug in bugs]


def document(scores: Sequence[Score], *, jobs: int, seconds: float) -> dict[str, Any]:
    """Return the JSON form of a run: totals, and ``faults`` with one object per bug."""
    return {
        "schema": SCHEMA,
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "totals": {
            "bugs": len(scores),
            "real": sum(score.real for score in scores),
            "hit": sum(score.hit for score in scores),
            "caught": sum(score.caught for score in scores),
            "diagnosis_right": sum(bool(score.diagnosis_right) for score in scores),
        },
        "faults": [score.to_dict() for score in scores],
    }
