"""The museum: which public bug has a fault, how it is run, and what must then be found."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.diagnosis import CAUSES as DEFINED
from fsdp_testkit.diagnosis import nearest
from fsdp_testkit.engine.engine import Engine, judge_hits
from fsdp_testkit.engine.procedures import PROCEDURES
from fsdp_testkit.engine.tests import FSDP2, HSDP, MAX_NORMS, prepare, training
from fsdp_testkit.engine.work import SpecWork
from fsdp_testkit.faults.base import Fault, faults_in
from fsdp_testkit.faults.bugs import BUGS

MODULES = (
    "gradients",
    "saving",
    "structure",
    "weights",
    "bugs_in_training",
    "bugs_of_optimizers",
    "bugs_of_hooks",
    "bugs_in_loading",
    "bugs_of_ties",
    "bugs_of_memory",
    "bugs_in_saving",
    "bugs_in_resuming",
    "bugs_between_ranks",
)

#: The closed list of causes and the evidence that defines each one.
CAUSES: dict[str, str] = {name: cause.evidence for name, cause in DEFINED.items()}

#: Bugs without a fault, each with what it would take.
NOT_REAL: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Entry:
    """One bug of the list.

    Attributes:
        bug: its id.
        thread: where it was reported.
        families: keys of `fsdp_testkit.faults.bugs.FAMILIES`.
        fault: the class that re-creates it, or ``None``.
        reason: why there is none, or ``""``.
    """

    bug: str
    thread: str
    families: tuple[int, ...]
    fault: type[Fault] | None
    reason: str

    @property
    def real(self) -> bool:
        """Whether the bug is re-created."""
        return self.fault is not None


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Return one entry per bug, in the order of the list.

    Raises:
        ValueError: two faults claim one bug, or a bug has neither fault nor reason, or both.
    """
    faults: dict[str, type[Fault]] = {}
    for name in MODULES:
        for fault in faults_in(importlib.import_module(f"fsdp_testkit.faults.{name}")):
            if fault.bug in faults:
                raise ValueError(f"{fault.__name__} and {faults[fault.bug].__name__} both claim {fault.bug}")
            if fault.bug:
                faults[fault.bug] = fault
    wrong = [bug for bug in BUGS if (bug in faults) == (bug in NOT_REAL)]
    if wrong:
        raise ValueError(f"bugs need either a fault or a reason: {wrong}")
    return tuple(
        Entry(bug, thread, families, faults.get(bug), NOT_REAL.get(bug, "")) for bug, (thread, families) in BUGS.items()
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """What a run under a fault gave.

    Attributes:
        rows: the result rows of all tests that were run.
        hits: activations of the fault.
        missing: what should have been found and was not; empty when the bug was caught for the right reason.
        found: the findings of the checks that the fault names.
        diagnosis: the nearest cause over the rows of the fault's own test, or ``""``.
        diagnosis_right: whether it is the one that the fault expects first.
    """

    rows: list[Result]
    hits: int
    missing: list[str]
    found: list[dict[str, Any]]
    diagnosis: str = ""
    diagnosis_right: bool = False


def runs_of(fault: type[Fault]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the (test, variant, checks) that a fault names: in each run one of the checks has a finding."""
    return [
        (fault.test, fault.variant, fault.checks),
        *((test, variant, (check,)) for test, variant, check in fault.also),
    ]


def show(engine: Engine, fault: type[Fault]) -> Shown:
    """Run the tests that a fault names, under the fault, and judge what they found."""
    armed = engine.armed(f"{fault.__module__}:{fault.__qualname__}")
    rows: list[Result] = []
    seen: list[dict[str, Any]] = []
    hits = 0
    missing = []
    for test, variant, checks in runs_of(fault):
        part = run(armed, fault, test, variant)
        found = [finding for row in part for finding in row.findings if finding["check"] in checks]
        missing += wrong_reason(fault, part, found, f"{test} {variant}", checks)
        hits += part[0].extra["fault_hits"]
        rows += part
        seen += found
    if hits <= 0:
        missing.append("the fault was never hit")
    cause = named_cause(rows, fault.test)
    return Shown(rows, hits, missing, seen, cause, cause == fault.causes[0])


def named_cause(rows: list[Result], test: str) -> str:
    """Return the nearest cause over the rows of one test, ``""`` where none is named."""
    found = nearest(row.extra.get("diagnosis", []) for row in rows if row.test == test)
    return str(found["cause"]) if found is not None else ""


def wrong_reason(
    fault: type[Fault], rows: list[Result], found: list[dict[str, Any]], place: str, checks: tuple[str, ...]
) -> list[str]:
    """Return what a run should have shown and did not: its outcome, its check, its words, the rank that it blames."""
    missing = []
    if not any(row.outcome == "failed" for row in rows):
        missing.append(f"{place} is {', '.join(row.outcome for row in rows)} instead of failed")
    if not found:
        others = sorted({finding["check"] for row in rows for finding in row.findings})
        missing.append(f"{place}: no finding of {', '.join(checks)} but of {', '.join(others) or 'nothing'}")
    reports = [finding["message"] + row.extra.get("report", "") for row in rows for finding in row.findings]
    if fault.says and not any(fault.says in text for text in reports):
        missing.append(f"no message says {fault.says!r}")
    if found and fault.blamed is not None and not any(item.get("rank") == fault.blamed for item in found):
        missing.append(f"rank {fault.blamed} is not blamed, but {sorted({str(i.get('rank')) for i in found})}")
    return missing


def green(engine: Engine, fault: type[Fault]) -> list[str]:
    """Run the tests that a fault names without it; return what is wrong, ``[]`` where all of them pass."""
    wrong = []
    for test, variant in dict.fromkeys((test, variant) for test, variant, _ in runs_of(fault)):
        for row in run(engine, fault, test, variant):
            if row.outcome != "passed":
                wrong.append(f"without the fault {test} {variant} on {row.layout} is {row.outcome}: {row.reason}")
    return wrong


def by_run(fault: type[Fault]) -> tuple[str, float, str, str, str]:
    """Sort key: faults of one model and test share truth and checkpoints."""
    return fault.model, fault.dropout, fault.variant, fault.test, fault.bug


def run(engine: Engine, fault: type[Fault], test: str, variant: str) -> list[Result]:
    """Run one test with the fault's own fields, on ``engine`` as it is: armed, or plain to see it green."""
    tie = {"untied": False, "tied": True, "default": None}[variant]
    work = engine.work(ModelSpec(model_type=fault.model, tie=tie, dropout=fault.dropout))
    before, patience = engine._hits(), work._deadline
    if fault.deadline and engine.settings.fault:
        prepare(engine, work)  # truth has the usual time
        work._deadline = fault.deadline
    try:
        if fault.fields:
            outcomes = training(engine, work, special_case(engine, work, fault, test))
        else:
            outcomes = PROCEDURES[test](engine, work)
    finally:
        work._deadline = patience
    if engine.settings.fault:
        judge_hits(outcomes, engine._hits() - before)
    return [outcome.to_result(work.spec, test, variant, engine.settings.backend, 0.0) for outcome in outcomes]


def special_case(engine: Engine, work: SpecWork, fault: type[Fault], test: str) -> Case:
    """Return a training case like that of ``test`` with the fault's fields."""
    layout = HSDP if test == "hsdp_vs_ddp" else FSDP2
    case = engine.case(work, test, layout, max_norms=MAX_NORMS)
    if fault.dropout:
        case = replace(case, max_norms=(0.0,))  # the bound was chosen without dropout
    return replace(case, **dict(fault.fields))


def sample() -> list[type[Fault]]:
    """Return the cheapest faults that together have every cause of the museum as their first one."""
    chosen: dict[str, type[Fault]] = {}
    for entry in entries():
        if entry.fault is None:
            continue
        best = chosen.get(entry.fault.causes[0])
        if best is None or price(entry.fault) < price(best):
            chosen[entry.fault.causes[0]] = entry.fault
    return list(chosen.values())


def price(fault: type[Fault]) -> float:
    """Return a guess of the seconds that a fault takes: waiting, ranks, models and tests that are not shared."""
    tests = {"meta_init": 1.0, "buffers_dtypes": 1.0, "auto_vs_ddp": 1.5, "sharding_structure": 1.5, "save_load": 2.0}
    slow = 2.0 * len(fault.also) + (3.0 if fault.model != "llama" or fault.fields or fault.dropout else 0.0)
    return tests.get(fault.test, 3.0) + 2.0 * fault.deadline + slow
