"""Every bug of the museum turns the named check red, for the right reason, and leaves the next run clean.

By default a sample runs that has every cause; ``-m museum`` runs all of it. A cause that no bug of the list has is
shown by a fault of the kit's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Engine, Settings
from fsdp_testkit.faults import museum
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.bugs import BUGS, FAMILIES
from fsdp_testkit.faults.misnamed import MISNAMED
from fsdp_testkit.faults.museum_page import page, read_score
from fsdp_testkit.faults.structure import BlockNotWrapped

DOCS = Path(__file__).parents[2] / "docs"


SAMPLE = sorted(museum.sample(), key=museum.by_run)
REST = sorted(
    (entry.fault for entry in museum.entries() if entry.fault is not None and entry.fault not in SAMPLE),
    key=museum.by_run,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Settings())
    yield engine
    engine.close()


def caught(engine: Engine, fault: type[Fault]) -> None:
    shown = museum.show(engine, fault)
    assert not shown.missing, "\n".join([*shown.missing, describe(shown.rows)])
    named = f"named {shown.diagnosis or 'nothing'}, expected {fault.causes[0]}"
    assert shown.diagnosis_right == (fault.bug not in MISNAMED), named
    assert not [row.extra["diagnosis_error"] for row in shown.rows if "diagnosis_error" in row.extra]


@pytest.mark.museum
@pytest.mark.parametrize("fault", SAMPLE, ids=lambda fault: fault.bug)
def test_a_bug_of_every_cause_is_caught(engine: Engine, fault: type[Fault]) -> None:
    caught(engine, fault)


@pytest.mark.museum
def test_a_cause_that_no_bug_of_the_list_has(engine: Engine) -> None:
    caught(engine, BlockNotWrapped)


def test_every_cause_is_shown_by_a_fault() -> None:
    assert {fault.causes[0] for fault in [*SAMPLE, BlockNotWrapped]} == museum.CAUSES.keys()


@pytest.mark.museum
@pytest.mark.museum_rest
@pytest.mark.parametrize("fault", REST, ids=lambda fault: fault.bug)
def test_bug_is_caught(engine: Engine, fault: type[Fault]) -> None:
    caught(engine, fault)


def runs(faults: list[type[Fault]]) -> list[type[Fault]]:
    """Return one fault for each kind of run that the faults make."""
    kinds = {(fault.model, fault.variant, fault.test, fault.fields, fault.dropout): fault for fault in faults}
    return list(kinds.values())


@pytest.mark.museum
@pytest.mark.museum_rest
@pytest.mark.parametrize("fault", runs([*SAMPLE, *REST]), ids=lambda fault: fault.bug)
def test_green_without_the_fault(engine: Engine, fault: type[Fault]) -> None:
    assert museum.green(engine, fault) == []


def test_every_bug_has_a_fault_or_a_reason() -> None:
    assert len(BUGS) == 103
    assert [entry.bug for entry in museum.entries()] == list(BUGS)
    assert all(entry.real != bool(entry.reason) for entry in museum.entries())
    assert museum.NOT_REAL.keys() <= BUGS.keys()


def test_every_entry_is_complete() -> None:
    for bug, (thread, families) in BUGS.items():
        assert thread.startswith("https://github.com/"), bug
        assert families, bug
        assert set(families) <= FAMILIES.keys(), bug
    for fault in [*SAMPLE, *REST]:
        assert fault.story, fault
        assert fault.checks, fault
        assert fault.causes, fault
        assert set(fault.causes) <= museum.CAUSES.keys(), fault
        assert fault.thread == BUGS[fault.bug][0]


def test_page_is_made_of_the_score() -> None:
    score = read_score(DOCS / "museum.json")
    written = (DOCS / "museum.md").read_text(encoding="utf-8")
    assert written == page(score), "run: python -m fsdp_testkit.faults.museum_page"


def test_score_is_of_these_faults() -> None:
    """The record of the last run of all: each bug hit and caught, and named as `MISNAMED` has it."""
    score = read_score(DOCS / "museum.json")
    assert [entry["id"] for entry in score["faults"]] == list(BUGS)
    for listed, entry in zip(museum.entries(), score["faults"], strict=True):
        assert listed.fault is not None
        assert [entry[key] for key in ("hit", "green", "caught")] == [True] * 3, listed.bug
        assert set(entry["caught_by"]) <= {check for _, _, checks in museum.runs_of(listed.fault) for check in checks}
        assert tuple(entry["expected"]) == listed.fault.causes, listed.bug
        assert entry["diagnosis_right"] == (listed.bug not in MISNAMED), listed.bug
        assert entry["seconds"] > 0


def test_a_score_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "score.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_score(file)
    file.write_text('{"schema": "another/1"}')
    with pytest.raises(UsageError, match="is no score of the museum: its schema is 'another/1'"):
        read_score(file)
    file.write_text('{"schema": "fsdp_testkit.museum/1", "faults": [{"id": "tie-lost-after-to-empty"}]}')
    with pytest.raises(UsageError, match=r"is the score of 1 bugs, and lacks fp32-upcast-is-noop"):
        read_score(file)


def describe(rows: list[Result]) -> str:
    return "\n".join(
        f"{row.layout}: {row.outcome} {row.reason} {row.extra.get('report', '')[:2000]}"
        for row in rows
        if row.outcome != "passed"
    )
