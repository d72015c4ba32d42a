"""The comparison with upstream's tests and the table of false alarms: what they conclude, and what they hold on to."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from benchmarks import against_upstream, false_alarms
from benchmarks.upstream_faults import FAULTS, ForwardRaises
from fsdp_testkit.core.result import Result


def result(**fields: Any) -> Result:
    values = {"model_type": "llama", "test": "auto_vs_ddp", "variant": "untied", "layout": "fsdp(2)"}
    return Result(**{**values, "backend": "transformers", "outcome": "failed", **fields})


def outcome(fault: str, side: str, said: str) -> dict[str, object]:
    return {"fault": fault, "side": side, "outcome": said}


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([outcome("", "kit", "green"), outcome("A", "kit", "caught"), outcome("A", "upstream", "missed")], 0),
        ([outcome("", "kit", "green"), outcome("A", "kit", "missed"), outcome("A", "upstream", "caught")], 1),
        ([outcome("", "kit", "red"), outcome("A", "kit", "caught")], 1),
        ([outcome("", "upstream", "hangs"), outcome("A", "kit", "caught")], 1),
    ],
)
def test_summary(rows: list[dict[str, object]], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert against_upstream.summary(rows) == status
    assert "1 faults: the kit catches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hits", "rank", "words", "said"),
    [
        (1, 1, "image of rank 1 cannot be read", "caught"),
        (0, 1, "image of rank 1 cannot be read", "missed"),
        (1, 0, "image of rank 1 cannot be read", "missed"),
        (1, 1, "something else", "missed"),
    ],
)
def test_the_kit_has_caught_a_fault_only_with_its_rank_and_words(hits: int, rank: int, words: str, said: str) -> None:
    finding = {"check": "ranks", "rank": rank, "message": "rank 1 raised"}
    row = result(findings=[finding], extra={"fault_hits": hits, "report": words})
    assert against_upstream.judged([row], ForwardRaises, 1.0).outcome == said


def test_the_distribution_has_to_be_that_of_the_installed_version(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unpacked source distribution"):
        against_upstream.mixin_file(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_fsdp_mixin.py").touch()
    (tmp_path / "PKG-INFO").write_text("Name: transformers\nVersion: 1.0\n")
    with pytest.raises(SystemExit, match="of the installed transformers"):
        against_upstream.mixin_file(tmp_path)


def test_what_faults_replace_is_still_there() -> None:
    """Seen in torch 2.13 and transformers 5.23."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, TrainingState
    from transformers import PreTrainedModel
    from transformers.distributed.checkpoint import _save_model_checkpoint_distributed
    from transformers.distributed.mixin import DistributedMixin

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(FSDPState._pre_forward) == ["self", "module", "args", "kwargs"]
    assert TrainingState.PRE_BACKWARD
    assert names(DistributedMixin._expand_parallel_plan) == ["self", "plan"]
    assert isinstance(vars(PreTrainedModel)["_finalize_model_loading"], staticmethod)
    assert names(_save_model_checkpoint_distributed)[0] == "model"
    assert all(fault.story and fault.weakness and fault.shows and fault.checks for fault in FAULTS)


def test_false_alarms_are_counted() -> None:
    runs = false_alarms.planned(2, "all", "headline")
    assert [(run.tier, run.seed) for run in runs] == [("core", 0), ("core", 1), ("extended", 0)]
    rows = [
        result(outcome="passed", max_rel_error=1e-6, tolerance=2e-5, extra={"rounding": [{}]}).to_dict(),
        result(outcome="passed", max_rel_error=4e-7, tolerance=5e-7).to_dict(),
        result(outcome="xpassed", reason="unexpected").to_dict(),
        result(outcome="error", reason="truth is gone").to_dict(),
    ]
    cells = dict(zip(false_alarms.HEAD, false_alarms.row(runs[0], rows, 7.2), strict=True))
    assert (cells["rows"], cells["passed"], cells["failed"], cells["rounding"]) == ("4", "2", "2", "1")
    assert (cells["largest error"], cells["tolerance"], cells["seconds"]) == ("4e-07", "5e-07", "7")
    assert [line.rpartition(": ")[2] for line in false_alarms.failures(rows)] == ["unexpected", "truth is gone"]
