"""The museum's command: what it chooses, how it runs, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.cli import main
from fsdp_testkit.faults import museum, score

REAL = [entry.fault for entry in museum.entries() if entry.fault is not None]


def test_list_and_filters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["museum"]) == 0
    assert f"{len(museum.entries())} bugs, {len(REAL)} real" in capsys.readouterr().out
    path = tmp_path / "hangs.json"
    assert main(["museum", "--family", "hangs", "--json", str(path)]) == 0
    listed = json.loads(path.read_text())
    assert [fault["id"] for fault in listed["faults"]] == [e.bug for e in museum.entries() if 12 in e.families]
    assert not any(fault["hit"] or fault["caught"] for fault in listed["faults"])
    assert score.select(families=["12"]) == score.select(families=["hangs"]) == score.select(families=["hang"])
    both = score.select(ids=["lr-not-loaded", "pp-export-error-hidden"], families=["hangs"])
    assert [entry.bug for entry in both] == ["pp-export-error-hidden"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--id", "nothing"], ["--id='nothing'", "lr-not-loaded"]),
        (["--family", "21"], ["--family='21'", "12 (hangs)"]),
        (["--family", "m"], ["--family='m'", "17 (memory)"]),  # several families have it
        (["--family", ""], ["--family=''", "17 (memory)"]),
        (["--id", "lr-not-loaded", "--family", "hangs"], ["no bug is one of lr-not-loaded and of the families hangs"]),
        (["--run", "--jobs", "0"], ["--jobs=0"]),
        (["--json", "/nowhere/score.json"], ["/nowhere does not exist"]),
    ],
)
def test_bad_input_names_what_is_known(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["museum", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(part in err for part in parts)


def test_chunks_hold_every_bug_once_and_keep_runs_together() -> None:
    groups = score.chunks(REAL)
    by_name = {fault.bug: fault for fault in REAL}
    assert sorted(bug for group in groups for bug in group) == sorted(by_name)
    runs = [{museum.by_run(by_name[bug])[:4] for bug in group} for group in groups]
    assert all(len(kinds) == 1 for kinds in runs)
    assert len({kind for kinds in runs for kind in kinds}) == len(groups)


def test_run_in_two_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    chosen = ["id-reuse-false-duplicate", "mutual-tied-keyerror"]
    arguments = [part for bug in chosen for part in ("--id", bug)]
    assert main(["museum", *arguments, "--run", "--jobs", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [fault["id"] for fault in written["faults"]] == chosen
    assert {written["totals"][name] for name in ("bugs", "real", "hit", "caught")} == {2}
    for fault in written["faults"]:
        assert (fault["real"], fault["hit"], fault["green"], fault["caught"]) == (True, True, True, True)
        assert (fault["caught_by"], fault["missing"]) == (["ranks"], [])
        assert fault["ranks"]
        assert fault["seconds"] > 0
    assert "2 bugs, 2 real: 2 caught" in capsys.readouterr().out


class Blind:
    """A scorer whose runs find nothing."""

    def score(self, bug: str) -> score.Score:
        known = score.unscored(score.select([bug])[0])
        return score.Score(**known.to_dict() | {"hit": True, "green": True, "missing": ("no finding of gradients",)})

    def close(self) -> None:
        pass


def test_a_bug_that_is_not_caught_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(score, "Scorer", Blind)
    assert main(["museum", "--run", "--id", "lr-not-loaded"]) == 1
    told: Any = capsys.readouterr()
    assert "NOT CAUGHT" in told.out
    assert "no finding of gradients" in told.out
    assert "lr-not-loaded: NOT CAUGHT" in told.err


def test_an_error_of_the_kit_is_that_bugs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[str]:
        raise RuntimeError("truth could not be computed")

    monkeypatch.setattr(museum, "green", broken)
    scorer = score.Scorer()
    result = scorer.score("lr-not-loaded")
    scorer.close()
    assert (result.real, result.hit, result.caught, result.diagnosis_right) == (True, False, False, False)
    assert "truth could not be computed" in result.missing[0]
