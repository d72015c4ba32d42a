"""The ledger's logic, on rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.ledger import Ledger

HEAD = 'cause = "it is wrong"\ndate = 2025-01-31\nfault_of = "transformers"\nlink = "https://example.org/1"\n'


def ledger(tmp_path: Path, text: str, name: str = "cause") -> Ledger:
    file = tmp_path / "known.toml"
    file.write_text(f'[[entry]]\nid = "{name}"\n{HEAD}{text}\n')
    return Ledger.load([file])


def row(outcome: str = "failed", *messages: str, **fields: Any) -> Result:
    values = {"model_type": "llama", "test": "dcp", "variant": "default", "layout": "fsdp(2)", "backend": "reference"}
    findings = [{"check": "x", "message": message} for message in messages or ("keys differ",)]
    return Result(**{**values, **fields}, outcome=outcome, findings=findings if outcome == "failed" else [])


def test_the_projects_own_ledger_loads() -> None:
    Ledger.load([Path(__file__).parents[1] / "model_matrix" / "known_failures.toml"])


@pytest.mark.parametrize(
    "claim",
    [
        "",
        'models = ["*"]',
        'models = ["gpt2", "llama"]',
        'models = ["lla*"]\ntests = ["dcp"]\nvariants = ["default"]\nlayouts = ["fsdp(2)"]\nbackends = ["reference"]',
        'versions = { transformers = "*" }',
        'match = "keys"',
    ],
)
def test_a_claimed_failure_is_expected(tmp_path: Path, claim: str) -> None:
    before = row()
    after = ledger(tmp_path, claim).apply(before)
    assert (after.outcome, after.cause, after.reason) == ("xfailed", "cause", "cause: it is wrong")
    assert after.findings == before.findings
    assert before.outcome == "failed"


@pytest.mark.parametrize(
    "claim",
    [
        'models = ["gpt2"]',
        'tests = ["save_load"]',
        'variants = ["tied", "untied"]',
        'layouts = ["hsdp(*)"]',
        'backends = ["transformers"]',
        'versions = { transformers = "4.*" }',
        'versions = { nothing-of-that-name = "1.*" }',
        'match = "shapes differ"',
    ],
)
def test_other_failures_stay_failures(tmp_path: Path, claim: str) -> None:
    assert ledger(tmp_path, claim).apply(row()).outcome == "failed"


def test_match_needs_one_message(tmp_path: Path) -> None:
    known = ledger(tmp_path, 'match = "^shapes .* differ$"')
    assert known.apply(row("failed", "keys differ", "shapes of w differ")).outcome == "xfailed"
    assert known.apply(row("failed", "keys differ")).outcome == "failed"


def test_an_error_is_expected_only_by_its_text(tmp_path: Path) -> None:
    error = row("error", reason="ValueError: no such layer")
    assert ledger(tmp_path, "").apply(error).outcome == "error"
    assert ledger(tmp_path, 'match = "no such layer"').apply(error).outcome == "xfailed"


@pytest.mark.parametrize(
    ("claim", "advice"),
    [
        ('models = ["llama"]', "delete the entry; else narrow its lists"),
        ('models = ["llama", "gpt2"]', "take 'llama' out of models"),
        (
            'models = ["llama", "gpt2"]\ntests = ["dcp", "resume"]',
            "take 'llama' out of models or take 'dcp' out of tests",
        ),
        ('models = ["ll*"]', "narrow its lists"),
    ],
)
def test_an_unexpected_pass_says_what_to_remove(tmp_path: Path, claim: str, advice: str) -> None:
    after = ledger(tmp_path, claim).apply(row("passed"))
    assert after.outcome == "xpassed"
    assert after.cause == "cause"
    assert "known.toml" in after.reason
    assert advice in after.reason
    assert "llama / dcp / default / fsdp(2) / reference" in after.reason


@pytest.mark.parametrize("outcome", ["not_applicable", "skipped"])
def test_what_did_not_run_is_left_alone(tmp_path: Path, outcome: str) -> None:
    known = ledger(tmp_path, "")
    assert known.apply(row(outcome)).outcome == outcome
    assert not known.stale([row(outcome)])


def test_staleness_is_judged_over_what_ran(tmp_path: Path) -> None:
    known = ledger(tmp_path, 'models = ["llama"]\nlayouts = ["hsdp(2, 2)"]')
    (sentence,) = known.stale([row("passed")])
    assert "'cause'" in sentence
    assert "fsdp(2)" in sentence
    # another model, test or backend says nothing about it
    assert not known.stale([row("passed", model_type="gpt2")])
    assert not known.stale([])
    assert not known.stale([row("xfailed", layout="hsdp(2, 2)"), row("passed")])


def test_a_model_that_does_not_exist_is_stale_in_a_full_run(tmp_path: Path) -> None:
    known = ledger(tmp_path, 'models = ["lama"]')
    assert not known.stale([row("passed")])
    (sentence,) = known.stale([row("passed")], ["llama", "gpt2"])
    assert "['lama'] match no model type" in sentence


def test_two_files_with_one_id(tmp_path: Path) -> None:
    paths = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for path in paths:
        path.write_text(f'[[entry]]\nid = "same"\n{HEAD}')
    with pytest.raises(UsageError, match=r"b\.toml: entry 'same' is there twice \(also in .*a\.toml\)"):
        Ledger.load(paths)
    # the same file twice (ini and command line) is one file
    assert len(Ledger.load([paths[0], paths[0]]).entries) == 1
