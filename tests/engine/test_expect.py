"""Tests that share ranks find what they find alone."""

from __future__ import annotations

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Engine, Settings

SPEC = ModelSpec(model_type="llama")
CELLS = [("auto_vs_ddp", "tied"), ("save_load", "tied"), ("dcp", "default"), ("buffers_dtypes", "default")]


def counts(rows: list[Result]) -> list[tuple[str, str, int, int]]:
    return [(row.layout, row.outcome, row.checks, row.tensors) for row in rows]


def test_a_backend_that_cannot_be_made_is_said_each_time() -> None:
    engine = Engine(Settings(backend="nosuch.module:Backend"))
    engine.expect(SPEC, CELLS)
    for cell in CELLS[:2]:
        with pytest.raises(UsageError, match="cannot be imported"):
            engine.run_test(SPEC, *cell)
    assert engine._harness is None
    engine.close()


def test_together_as_alone(fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_engine.expect(SPEC, CELLS)
    together = [fresh_engine.run_test(SPEC, *cell) for cell in CELLS]
    harness = fresh_engine._harness
    assert harness is not None
    jobs = []
    run = harness.run
    monkeypatch.setattr(harness, "run", lambda job, **options: (jobs.append(job.target), run(job, **options))[1])
    # what was announced is done, and done once
    alone = [fresh_engine.run_test(SPEC, *cell) for cell in CELLS]
    assert [counts(rows) for rows in together] == [counts(rows) for rows in alone]
    assert {row.outcome for rows in together for row in rows} == {"passed"}
    assert all(row.seconds > 0 for rows in together for row in rows)
    assert not any(target.endswith("batch:run") for target in jobs)


def test_what_was_announced_is_run_with_the_first(fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [("auto_vs_ddp", "untied"), ("sharding_structure", "untied")]
    fresh_engine.expect(SPEC, cells)
    fresh_engine.run_test(SPEC, *cells[0])
    assert fresh_engine._harness is not None
    monkeypatch.setattr(fresh_engine._harness, "run", lambda *_, **__: pytest.fail("a job was run"))
    rows = fresh_engine.run_test(SPEC, *cells[1])
    assert len(rows) == 4
    assert {row.outcome for row in rows} == {"passed"}
