"""The benchmark of saving runs, small: its columns are there, and the methods save the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import saving


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    size = ["--mib", "4", "--repeat", "1", "--ranks", "2", "--models", "moe", "--folder", str(tmp_path)]
    saving.main([*size, "--methods", "transformers", "ours", "--json", str(tmp_path / "out.json")])
    text = capsys.readouterr().out
    assert all(column in text for column in saving.COLUMNS)
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    found = result["methods"]
    assert {method["content"] for method in found.values()} == {found["ours"]["content"]}
    assert found["transformers"]["ratio"] == 1.0
    assert all(method["seconds"] > 0 for method in found.values())
    assert all(method["written"] > 3 * 2**20 for method in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # what was saved is gone


@pytest.mark.parametrize("bad", [["--mib", "0"], ["--repeat", "0"], ["--ranks", "0"]])
def test_bad_options(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        saving.main(bad)
    assert "must be at least 1" in capsys.readouterr().err
