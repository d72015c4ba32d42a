"""The benchmark of loading runs, in small, and its methods agree; its figures are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loading_plot import together

ROOT = Path(__file__).parent.parent


def test_methods_load_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    target = tmp_path / "out.json"
    methods = ["accelerate", "transformers", "ours, rank0", "ours, slices"]
    command = [sys.executable, "-m", "benchmarks.loading", "--mib", "2", "--repeat", "0", "--ranks", "2"]
    command += ["--models", "moe", "--dtypes", "float32", "--json", str(target), "--methods", *methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") >= len(methods) + 2
    (result,) = json.loads(target.read_text())["results"]
    assert result["equal"]
    assert set(result["methods"]) == set(methods)
    for row in result["methods"].values():
        assert len(row["checksums"]) == 2
        assert row["seconds"] > 0
        assert len(row["timelines"]) == 2
    read = {name: row["bytes_read"] for name, row in result["methods"].items()}
    size = result["methods"]["transformers"]["model_bytes"] / 2  # bf16 in the file
    assert read["ours, slices"] > 0.99 * size
    # every rank reads all, with the switch set as without
    assert read["accelerate"] > read["ours, slices"] + 0.8 * size


def test_timelines_of_ranks_are_added() -> None:
    assert together([[[0, 1, 0], [2000, 3, 0]], [[1000, 10, 0]]]) == ([0, 1, 2], [1024, 11 * 1024, 13 * 1024])
