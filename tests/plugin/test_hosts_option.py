"""``--fsdp-hosts`` and an outer torchrun: what is impossible is told before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_project import Project

from fsdp_testkit.cli import main

RANKS = """
import pytest

@pytest.mark.ranks({count})
def test_on_ranks(rank):
    pass
"""
OUTER = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDP_TESTKIT_SECRET", "FSDP_TESTKIT_SECRET_FILE", *OUTER):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def outer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torchrun tells one of two processes on one machine."""
    for name, value in OUTER.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refused(project: Project, *arguments: str) -> str:
    result = project.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str()
    assert not project.calls(), "nothing may have run"
    assert "passed" not in result.stdout.str()
    (line,) = [line for line in result.stderr.lines if line.startswith("ERROR: ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--fsdp-hosts=a:x"], "host='a:x' must look like name, name:port"),
        (["--fsdp-hosts=a,a"], "each of them once"),
        (["--fsdp-hosts=a"], "need a shared secret"),
        (["--fsdp-hosts=a", "--fsdp-secret-file=nowhere"], "nowhere cannot be read"),
    ],
)
def test_impossible_hosts(project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str) -> None:
    if "secret" not in part and "nowhere" not in part:
        monkeypatch.setenv("FSDP_TESTKIT_SECRET", "0123456789abcdef")
    assert part in refused(project, *arguments)


def test_the_secret_is_taken_from_no_option(project: Project) -> None:
    file = project.path / "open"
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    assert "chmod 600" in refused(project, "--fsdp-hosts=a", f"--fsdp-secret-file={file}")
    result = project.run("--fsdp-secret=0123456789abcdef")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.usefixtures("outer")
def test_more_ranks_than_torchrun_has_started(project: Project) -> None:
    project.pytester.makepyfile(RANKS.format(count=3))
    line = refused(project)
    assert "test_on_ranks needs 3 ranks, and torchrun's processes have 2" in line


@pytest.mark.usefixtures("outer")
@pytest.mark.parametrize("test", ["hsdp_vs_ddp", "save_load"])
def test_a_test_of_a_model_that_needs_more(matrix: Project, test: str) -> None:
    line = refused(matrix, "--fsdp-models=llama", "-k", test)
    assert "ranks, and torchrun's processes have 2" in line
    assert test in line


def test_what_is_deselected_does_not_count(matrix: Project, outer: pytest.MonkeyPatch) -> None:
    outer.setenv("LOCAL_WORLD_SIZE", "1")  # so that what fits is refused later, for another reason
    line = refused(matrix, "--fsdp-models=llama", "-k", "auto_vs_ddp")
    assert "on several machines: say --fsdp-beyond-loopback" in line


def test_several_machines_need_a_secret_that_is_there_before(project: Project, outer: pytest.MonkeyPatch) -> None:
    outer.setenv("LOCAL_WORLD_SIZE", "1")
    project.pytester.makepyfile(RANKS.format(count=2))
    assert "need a shared secret" in refused(project, "--fsdp-beyond-loopback")


def test_a_torchrun_without_a_store_is_refused(project: Project, outer: pytest.MonkeyPatch) -> None:
    outer.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    project.pytester.makepyfile(RANKS.format(count=2))
    assert "torchrun must hold a store" in refused(project)


@pytest.mark.usefixtures("outer")
def test_workers_of_xdist_refuse_every_test_on_ranks(project: Project) -> None:
    project.pytester.makepyfile(RANKS.format(count=1) + "\ndef test_plain():\n    pass\n")
    result = project.run("-n1", subprocess=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*torchrun starts the ranks of one pytest: leave -n away*"])


def test_tests_without_ranks_run_in_every_process_as_before(project: Project, outer: pytest.MonkeyPatch) -> None:
    outer.setenv("RANK", "1")
    project.pytester.makepyfile("def test_plain():\n    pass\n")
    project.run().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--listen", "0.0.0.0"], "is not loopback"),
        (["--listen", "127.0.0.1:x"], "must look like"),
        (["--ranks", "0"], "ranks=0 must be at least 1"),
        (["--ranks", "two"], "--ranks='two'"),
        (["--listen", "no-such-host.invalid"], "cannot be resolved"),
        (["--join"], "for processes that torchrun has started"),
    ],
)
def test_impossible_agents(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    monkeypatch.setenv("FSDP_TESTKIT_SECRET", "0123456789abcdef")
    assert main(["ranks", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_an_agent_without_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks"]) == 2
    assert "need a shared secret" in capsys.readouterr().err
    assert main(["ranks", "--secret-file", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
