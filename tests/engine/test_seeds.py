"""A case whose data leaves out an expert on some rank takes another seed, and all tests of the model take it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import InternalError
from fsdp_testkit.engine import tests
from fsdp_testkit.engine.engine import Engine, Settings
from fsdp_testkit.engine.work import SEED_STEP

#: zaya routes to one expert for each token, by a network of three layers: weights of seed 7 starve an expert.
WEAK = ModelSpec(model_type="zaya")
CELLS = [("sharding_structure", "untied"), ("buffers_dtypes", "default"), ("hsdp_vs_ddp", "untied")]


@pytest.fixture
def engine() -> Any:
    engine = Engine(Settings(seed=7))
    yield engine
    engine.close()


def test_another_seed_is_taken_and_said(engine: Engine) -> None:
    engine.expect(WEAK, CELLS)
    rows = [row for cell in CELLS for row in engine.run_test(WEAK, *cell)]
    assert [row.outcome for row in rows] == ["passed"] * len(rows)
    seeds = {row.extra["seed"] for row in rows if row.variant == "untied"}
    assert len(seeds) == 1
    assert (min(seeds) - 7) % SEED_STEP == 0


def test_without_another_seed_the_case_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests, "SEEDS", 1)
    (row,) = engine.run_test(WEAK, "hsdp_vs_ddp", "untied")
    assert row.outcome == "failed"
    assert "reaches an expert" in row.reason


def test_a_seed_that_will_do_is_kept(engine: Engine) -> None:
    rows = engine.run_test(ModelSpec(model_type="mixtral"), "auto_vs_ddp", "untied")
    assert [row.outcome for row in rows] == ["passed"]
    assert "seed" not in rows[0].extra


def test_a_seed_that_was_used_stays(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=False))
    tests.prepare(engine, work)
    with pytest.raises(InternalError, match="cannot take another one"):
        work.reseed()
    other = engine.work(ModelSpec(model_type="llama", tie=True))
    other.train(tests.auto_case(engine, other, "auto_vs_ddp"))
    with pytest.raises(InternalError, match="has been run with seed 7"):
        other.reseed()


def test_a_replayed_case_has_the_seed_that_was_taken(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="zaya", tie=False))
    cases = tests.prepare(engine, work)
    assert work.seed != 7
    assert {case.seed for case in cases} == {work.seed}
    assert json.loads(cases[0].to_json())["seed"] == work.seed
    assert Case.from_json(cases[0].to_json()).seed == work.seed
