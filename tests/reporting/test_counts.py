"""Counts of checks: what is recorded, and what counts as a fall."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import Result
from fsdp_testkit.reporting.counts import count, fallen, read_counts, text_of, vanished


def row(checks: int = 10, tensors: int = 4, outcome: str = "passed", **fields: str) -> Result:
    kept = {"model_type": "llama", "test": "dcp", "variant": "default", "layout": "fsdp(2)", "backend": "reference"}
    return Result(**(kept | fields), outcome=outcome, checks=checks, tensors=tensors)


def test_rows_of_a_test_are_summed() -> None:
    rows = [row(), row(layout="fsdp(3)", checks=5), row(test="resume", outcome="failed")]
    assert count(rows) == {"reference": {"llama": {"dcp default": [2, 15, 8]}}}


def test_a_row_with_rounding_has_other_numbers_and_does_not_count() -> None:
    rounded = row(checks=3)
    rounded.extra["rounding"] = [{"check": "weights"}]
    assert count([row(layout="fsdp(3)"), rounded]) == {}


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ([row(), row(layout="fsdp(3)")], None),
        ([row(checks=11), row(layout="fsdp(3)")], None),
        ([row(checks=9), row(layout="fsdp(3)")], "19 checks instead of 20"),
        ([row(tensors=3), row(layout="fsdp(3)")], "7 compared tensors instead of 8"),
        ([row(checks=20, tensors=8)], "1 rows instead of 2"),
        # a test that failed or did not run has told so already
        ([row(checks=1, outcome="failed")], None),
        ([row(test="resume", checks=1)], None),
        ([row(backend="transformers", checks=1)], None),
    ],
)
def test_a_fall_is_told(now: list[Result], line: str | None) -> None:
    recorded = count([row(), row(layout="fsdp(3)")])
    lines = fallen(count(now), recorded)
    assert lines == ([] if line is None else [f"llama: dcp default with reference has {line}"])


def test_a_test_that_is_gone_is_told() -> None:
    recorded = count([row(), row(test="resume"), row(model_type="gpt2"), row(backend="mine:Backend", test="resume")])
    assert vanished([row(checks=1, outcome="failed"), row(test="resume"), row(model_type="gpt2")], recorded) == []
    assert vanished([row(), row(test="resume")], recorded) == [
        "gpt2: dcp default with reference did not run, and is recorded"
    ]
    assert vanished([row(), row(model_type="gpt2")], recorded) == [
        "llama: resume default with reference did not run, and is recorded"
    ]


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    counts = count([row(), row(model_type="gpt2"), row(backend="mine:Backend")])
    path = tmp_path / "counts.json"
    path.write_text(text_of(counts))
    assert read_counts(path) == counts


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "other"}', '{"schema": "fsdp_testkit counts 1", "counts": 3}'])
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counts.json"
    with pytest.raises(UsageError, match="counts makes them of a report"):
        read_counts(path)
    path.write_text(text)
    with pytest.raises(UsageError, match=r"counts\.json"):
        read_counts(path)
