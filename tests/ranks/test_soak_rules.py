"""What the long runs take for a finding; the runs themselves are ``make soak`` and ``make ten-times``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import soak
import ten_times


def test_growth_beyond_one_percent_is_a_finding() -> None:
    before = {"threads": 3, "memory (KiB)": 1000}
    assert soak.growth(before, {"threads": 3, "memory (KiB)": 1010}) == []
    assert soak.growth(before, {"threads": 4, "memory (KiB)": 1011}) == [
        "threads: 3 -> 4",
        "memory (KiB): 1000 -> 1011",
    ]


@pytest.mark.parametrize(
    ("jobs", "slower", "error", "left", "found"),
    [
        (100, 0.009, 0.001, [], []),
        (100, 0.02, 0.011, [], []),
        (100, 0.02, 0.001, [], ["jobs get slower, by 2.00% +- 0.10%"]),
        (100, 0.0, 0.0, ["job"], ["1 folders are left"]),
    ],
)
def test_what_a_soak_finds(
    jobs: int,
    slower: float,
    error: float,
    left: list[str],
    found: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Process:
        pid = 1

    class Link:
        process = Process()

    class Fake:
        def __init__(self, **_: object) -> None:
            self.folder = tmp_path
            self._links = {"fork": Link()}

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    for name in left:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(soak, "Harness", Fake)
    monkeypatch.setattr(soak, "run", lambda _, count: [0.05] * count)
    monkeypatch.setattr(soak, "usage", lambda _: {"threads": 3, "memory (KiB)": 1000})
    monkeypatch.setattr(soak, "against_fresh", lambda *_: (slower, error))
    assert soak.soak(jobs) == found


def report(folder: Path, seed: int, **outcomes: str) -> None:
    rows = [{"model_type": model, "test": "dcp", "outcome": outcome} for model, outcome in outcomes.items()]
    (folder / f"seed-{seed}.json").write_text(json.dumps({"results": rows}))


@pytest.mark.parametrize(
    ("second", "status", "code", "said"),
    [
        ({"llama": "passed", "gpt2": "xfailed"}, 0, 0, "2 runs: 0 flakes and failures"),
        ({"llama": "failed", "gpt2": "xfailed"}, 1, 1, "llama/dcp///: passed -> failed"),
        ({"llama": "passed"}, 0, 1, "gpt2/dcp///: xfailed -> no row"),
        ({"llama": "passed", "gpt2": "xfailed"}, 3, 1, "exit status 3, 2 rows"),
        ({}, 0, 1, "exit status 0, 0 rows"),
    ],
)
def test_what_ten_runs_find(
    second: dict[str, str],
    status: int,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Done:
        def __init__(self, returncode: int) -> None:
            self.returncode = returncode

    def fake(command: list[str], **_: object) -> Done:
        seed = int(command[command.index("--fsdp-seed") + 1])
        report(tmp_path, seed, **({"llama": "passed", "gpt2": "xfailed"} if seed == 5 else second))
        return Done(0 if seed == 5 else status)

    monkeypatch.setattr(subprocess, "run", fake)
    assert ten_times.main(["--runs", "2", "--first-seed", "5", "--folder", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert "seed 5: 1 passed, 1 xfailed; exit status 0; " in printed
    assert said in printed
