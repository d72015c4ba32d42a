"""Two reports compared."""

from __future__ import annotations

from typing import Any

from fsdp_testkit.core.result import Result
from fsdp_testkit.reporting.difference import SHOWN, difference_lines
from fsdp_testkit.reporting.report import report_document


def report(**outcomes: str) -> dict[str, Any]:
    rows = [
        Result(
            model_type=model,
            test="dcp",
            variant="default",
            layout="fsdp(2)",
            backend="reference",
            outcome=outcome,
            reason="a | b\nc" if outcome == "failed" else "",
        )
        for model, outcome in outcomes.items()
    ]
    return report_document(rows, {})


def test_changes_are_listed_with_the_bad_ones_first() -> None:
    lines = difference_lines(
        report(aya="xfailed", gpt2="passed", llama="passed", old="passed"),
        report(aya="passed", gpt2="passed", llama="failed", new="passed"),
    )
    assert "| passed | 3 | 3 |" in lines
    assert "| failed | 0 | 1 |" in lines
    assert "2 rows changed, 1 new, 1 gone." in lines
    assert lines[-2] == "| llama | dcp default | fsdp(2) | passed | failed | a \\| b c |"
    assert lines[-1].startswith("| aya |")


def test_equal_reports_say_so() -> None:
    lines = difference_lines(report(llama="passed"), report(llama="passed"))
    assert lines[-1] == "0 rows changed, 0 new, 0 gone."


def test_other_versions_are_named() -> None:
    later = report(llama="passed")
    later["environment"]["torch"] = "9.9"
    assert difference_lines(report(llama="passed"), later)[0].endswith("-> 9.9")


def test_a_long_list_is_cut() -> None:
    models = [f"m{index:03}" for index in range(SHOWN + 3)]
    lines = difference_lines(report(**dict.fromkeys(models, "passed")), report(**dict.fromkeys(models, "failed")))
    assert lines[-1] == "and 3 more"
    assert sum(line.startswith("| m") and "dcp" in line for line in lines) == SHOWN
