"""The command line, with a fake engine where one is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.cli import main
from fsdp_testkit.core.result import SCHEMA, Result
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.reporting.report import report_document, write_report

CASE = '{"layout":{"kind":"fsdp","shard":2},"model":{"model_type":"llama"},"seed":3}'


def row(**fields: Any) -> Result:
    values = {"model_type": "llama", "test": "dcp", "variant": "default", "layout": "fsdp(2)", "backend": "reference"}
    return Result(**{**values, "outcome": "passed", "checks": 3, **fields})


class FakeEngine:
    rows: list[Result]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def run_case(self, case: Any) -> list[Result]:
        assert (self.settings.backend, self.settings.seed, self.settings.deadline) == (case.backend, 3, 60.0)
        return self.rows

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr("fsdp_testkit.engine.engine.Engine", FakeEngine)
    return FakeEngine


def test_replay(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engine.rows = [row()]
    assert main(["replay", CASE]) == 0
    assert "llama: dcp on fsdp(2) with backend reference: passed (3 checks, 0 tensors" in capsys.readouterr().out
    engine.rows = [row(outcome="failed", findings=[{"check": "keys", "message": "one is gone"}])]
    (tmp_path / "case.json").write_text(CASE)
    assert main(["replay", f"@{tmp_path / 'case.json'}"]) == 1
    assert "1. keys: one is gone" in capsys.readouterr().out
    engine.rows = []
    assert main(["replay", CASE]) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["replay", "x"], "must be the JSON printed with a failure"),
        (["replay", "{}"], "with 'model' and 'layout'"),
        (["replay", CASE.replace('"seed"', '"sed"')], "unknown fields ['sed']"),
        (["replay", CASE.replace('"seed":3', '"steps":"x"')], "wrong type"),
        (["replay", CASE.replace('"seed":3', '"backend":"nothing"')], "case: backend='nothing'"),
        (["replay", CASE.replace('"seed":3', '"fault":"nothing:At"')], "case: fault='nothing:At' cannot be imported"),
        (["replay", CASE, "--deadline", "0"], "--deadline='0'"),
        (["replay", "@/nowhere"], "/nowhere"),
        (["tiny", "lama"], "near matches: llama"),
        (["tiny", "gemma3n"], "no tiny config"),
        (["merge", "nowhere.json", "-o", "out.json"], "nowhere.json does not exist"),
        (["merge", "nowhere.json", "-o", "."], "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("fsdp_testkit: ")
    assert err.count("\n") == 1
    assert part in err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "  * llama\n" in out
    assert "gemma3n  impossible: " in out
    assert all(name in out for name in TESTS)
    assert "    transformers\n" in out


def test_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "llama", "--variant", "tied"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, out = (tmp_path / name for name in ("a.json", "b.json", "out.json"))
    write_report(first, report_document([row(outcome="failed"), row(model_type="gpt2")], {}))
    write_report(second, report_document([row()], {}))
    assert main(["merge", str(first), str(second), "-o", str(out)]) == 0
    assert "2 rows, 1 replaced" in capsys.readouterr().out
    merged = json.loads(out.read_text())
    assert merged["schema"] == SCHEMA
    assert len(merged["environment"]["merged"]) == 2
    assert [(item["model_type"], item["outcome"]) for item in merged["results"]] == [
        ("gpt2", "passed"),
        ("llama", "passed"),
    ]
    out.write_text('{"schema": "other"}')
    assert main(["merge", str(out), "-o", str(first)]) == 2
    assert "has schema 'other'" in capsys.readouterr().err
