"""The second look at a red run never costs its findings, and green runs do not pay for it."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.finding import Finding
from fsdp_testkit.engine import explain
from fsdp_testkit.engine.outcome import Outcome

ANY: Any = None


def outcome(*findings: Finding) -> Outcome:
    made = Outcome()
    made.verdict.findings = list(findings)
    return made


def broken(*_: object) -> None:
    raise KeyError("step 9")


def test_what_goes_wrong_in_the_second_look_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_look", broken)
    red = outcome(Finding(check="ties", message="a and b are no longer one object: the tie was lost", rank=0))
    explain.look_closer(red, ANY, ANY, [], ANY)
    assert "KeyError: 'step 9'" in red.extra["diagnosis_error"]
    assert len(red.verdict.findings) == 1
    assert red.diagnosis()[0]["cause"] == "tie lost"


def test_a_rule_that_breaks_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsdp_testkit.engine.outcome.diagnose", broken_rule)
    red = outcome(Finding(check="ties", message="lost", rank=0))
    row = red.to_result(ModelSpec(model_type="llama"), "auto_vs_ddp", "tied", "reference", 1.0)
    assert row.outcome == "failed"
    assert row.extra["diagnosis"] == []
    assert "step 9" in row.extra["diagnosis_error"]


def broken_rule(*_: object, **__: object) -> None:
    raise KeyError("step 9")


def test_a_green_row_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_look", broken)
    green = outcome()
    explain.look_closer(green, ANY, ANY, [], ANY)
    assert green.extra == {}
    assert green.diagnosis() == []
