"""The consumers of rows: text of a failure, matrix, report."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.core.result import OUTCOMES, Result
from fsdp_testkit.reporting import matrix, report
from fsdp_testkit.reporting.failure import failure_text, fold_ranks


def row(outcome: str = "passed", **fields: Any) -> Result:
    values = {"model_type": "llama", "test": "dcp", "variant": "default", "layout": "fsdp(2)", "backend": "reference"}
    return Result(**{**values, "outcome": outcome, **fields})


def text_of(lines: list[matrix.Line]) -> list[str]:
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def finding(**fields: Any) -> dict[str, Any]:
    return {"check": "weights", "message": "it differs", **fields}


def test_failure_has_everything() -> None:
    case = {"model": {"model_type": "it's"}}
    causes = [
        {"cause": "replica diverged", "text": "w on rank 3", "advice": "Broadcast.", "threads": ["https://a.b/1"]},
        {"cause": "wrong factor", "text": "", "advice": "", "threads": []},
    ]
    text = failure_text(
        [
            row("passed"),
            row(
                "failed",
                variant="tied",
                layout="hsdp(2, 2)",
                reason="replicas differ",
                findings=[
                    finding(
                        rank=3, step=0, parameter="w", expected="1.0", actual="2.0", max_abs_error=1.0,
                        max_rel_error=0.5, tolerance=1e-6, judged_by="ddp", nature="logic",
                    )
                ],
                extra={"case": case, "diagnosis": causes},
            ),
        ]
    )  # fmt: skip
    assert text.splitlines()[:12] == [
        "llama: dcp (tied) failed on hsdp(2, 2) with backend reference (1 finding)",
        "  replicas differ",
        "  likely cause: replica diverged: w on rank 3",
        "    look at   Broadcast.",
        "    alike     https://a.b/1",
        "    or else   wrong factor",
        "",
        "  1. weights: it differs",
        "     where     rank 3, step 0, w",
        "     expected  1.0",
        "     actual    2.0",
        "     error     1 absolute, 0.5 relative, tolerance 1e-06 relative",
    ]
    command = shlex.split(text.splitlines()[-1])
    assert command[:4] == ["python", "-m", "fsdp_testkit", "replay"]
    # the shell gives back exactly the case, quotes and all
    assert json.loads(command[4]) == case


def test_a_finding_of_step_and_rank_zero_says_so() -> None:
    assert "rank 0, step 0" in failure_text([row("failed", findings=[finding(rank=0, step=0)])])


def test_many_findings_are_cut_and_counted() -> None:
    findings = [finding(step=step, rank=rank) for step in range(10) for rank in range(2)]
    text = failure_text([row("failed", findings=findings, extra={"findings_total": 70})])
    assert "(70 findings)" in text
    assert "  8. weights" in text
    assert "  9. weights" not in text
    assert "  and 54 more: 4 x weights (--fsdp-report" in text


def test_several_bad_rows_each_show_something() -> None:
    rows = [row("failed", layout=f"fsdp({n})", findings=[finding(step=step) for step in range(9)]) for n in (2, 3, 8)]
    text = failure_text(rows)
    assert text.startswith("llama: dcp failed on fsdp(2), fsdp(3), fsdp(8) with backend reference (27 findings)")
    assert text.count("  1. weights") == 3


def test_ranks_fold_to_the_worst() -> None:
    (folded,) = fold_ranks(
        [finding(rank=0, max_abs_error=1.0), finding(rank=1, max_abs_error=3.0), finding(rank=2, max_abs_error=2.0)]
    )
    assert folded["ranks"] == [0, 1, 2]
    assert folded["max_abs_error"] == 3.0
    (folded,) = fold_ranks([finding(rank=0, max_abs_error=math.nan), finding(rank=1, max_abs_error=3.0)])
    assert "nan" in failure_text([row("failed", findings=[finding(max_abs_error=math.nan)])])


def test_errors_show_their_report_without_its_middle() -> None:
    text = failure_text(
        [row("error", layout="", reason="a rank died", extra={"report": "\n".join(map(str, range(100)))})]
    )
    assert text.startswith("llama: dcp could not be run with backend reference\n  a rank died")
    assert "... 40 lines ..." in text


def test_matrix_shows_the_worst_of_a_cell() -> None:
    rows = [
        row(),
        row("failed", layout="fsdp(3)"),
        row(test="auto_vs_ddp", variant="untied"),
        row("xfailed", test="auto_vs_ddp", variant="tied", reason="known"),
        row("not_applicable", model_type="gpt2", reason="cannot"),
        row("passed", model_type="gpt2", layout="fsdp(3)"),
    ]
    lines = text_of(matrix.matrix_lines(rows, order=["auto_vs_ddp", "dcp"]))
    assert lines == [
        "model  auto  dcp",
        "       u t   (u untied, t tied)",
        "gpt2         .",  # in the order of names: workers end in any
        "llama  . x   F",
        "",
        ". passed  x xfailed  F failed",
        "",
        "x known (1: llama)",
        "- cannot (1: gpt2)",
        "",
        "2 models, 6 rows: 1 failed, 1 xfailed, 3 passed, 1 not applicable",
        "0 checks, 0 tensors compared",
    ]


def test_what_only_float64_could_judge_is_no_measure_of_the_rest() -> None:
    rows = [row(max_rel_error=1e-6, tolerance=2e-5), row(test="resume", max_rel_error=49.0, tolerance=2e-5)]
    rows[1].extra["rounding"] = [finding()]
    _, numbers, rounded = text_of(matrix.total_lines(rows))
    assert "largest relative error that passed 1e-06" in numbers
    assert rounded.startswith(
        "1 row with rounding only, as float64 shows; the largest relative error was 49, llama: resume"
    )


def test_every_outcome_has_a_sign() -> None:
    assert set(matrix.SIGNS) == set(OUTCOMES)


def test_backends_have_a_matrix_each() -> None:
    lines = text_of(matrix.matrix_lines([row(), row(backend="transformers")]))
    assert "backend reference" in lines
    assert "backend transformers" in lines


@pytest.mark.parametrize("verbose", [False, True])
def test_many_models_fold(verbose: bool) -> None:
    rows = [row("failed" if number == 7 else "passed", model_type=f"model{number}") for number in range(189)]
    lines = text_of(matrix.matrix_lines(rows, verbose=verbose))
    assert ("... and 188 more models without a failure (-v shows them)" in lines) is not verbose
    assert sum(line.startswith("model") for line in lines) == (190 if verbose else 2)


def test_width_of_the_headline_matrix_fits_a_terminal() -> None:
    from fsdp_testkit.engine.catalogue_of_tests import TESTS, of_tier

    rows = [
        row(model_type="qwen3_5_moe_text", test=info.name, variant=variant)
        for info in map(TESTS.__getitem__, of_tier("core"))
        for variant in info.variants
    ]
    lines = text_of(matrix.matrix_lines(rows, order=list(TESTS)))
    assert max(map(len, lines[:3])) <= 80


def test_report_is_sorted_finite_and_whole(tmp_path: Path) -> None:
    rows = [row(model_type="b", max_abs_error=math.inf), row(model_type="a", extra={"x": (1, math.nan)})]
    path = tmp_path / "report.json"
    report.write_report(path, report.report_document(rows, {"seed": 1}))
    document = report.read_report(path)
    assert [item["model_type"] for item in document["results"]] == ["a", "b"]
    assert document["results"][1]["max_abs_error"] == "inf"
    assert document["results"][0]["extra"] == {"x": [1, "nan"]}
    environment = document["environment"]
    assert environment["options"] == {"seed": 1}
    assert all(environment[name] for name in ("fsdp_testkit", "python", "torch", "transformers", "platform", "cpus"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checking_a_target_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.check_target(path)
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    path.chmod(0o640)
    report.check_target(path)
    assert path.read_text() == "old"
    report.write_report(path, {})
    assert path.stat().st_mode & 0o777 == 0o640
