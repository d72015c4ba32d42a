"""Impossible input: one clear message on the controller, exit status 4, before anything has started."""

from __future__ import annotations

import pytest
from plugin_project import Project, refused

LEDGER_ENTRY = """
[[entry]]
id = "a-cause"
cause = "text"
date = 2025-01-31
fault_of = "torch"
link = "https://example.org/1"
"""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--fsdp-models=lama"], ["'lama'", "near matches", "llama"]),
        (["--fsdp-models=headlines"], ["'headlines'", "headline"]),
        (["--fsdp-models=,"], ["selects nothing"]),
        (["--fsdp-models=nowhere/config.json"], ["existing config.json"]),
        (["--fsdp-backend=transfomers"], ["'transfomers'", "did you mean transformers?"]),
        (["--fsdp-backend=nowhere.at.all:Thing"], ["cannot be imported", "No module named"]),
        (["--fsdp-backend=json:Thing"], ["cannot be imported", "no attribute 'Thing'"]),
        (["--fsdp-backend=json:JSONDecoder"], ["is no backend", "lacks load, make_optimizer, train_step, save"]),
        (["--fsdp-fault=json"], ["must look like package.module:Class"]),
        (["--fsdp-fault=nowhere:Fault"], ["--fsdp-fault", "cannot be imported"]),
        (["--fsdp-seed=one"], ["--fsdp-seed='one'", "integer"]),
        (["--fsdp-seed=-1"], ["--fsdp-seed='-1'", "integer"]),
        (["--fsdp-deadline=0"], ["--fsdp-deadline='0'", "above 0"]),
        (["--fsdp-deadline=nan"], ["--fsdp-deadline='nan'", "above 0"]),
        (["--fsdp-device=tpu"], ["--fsdp-device='tpu'", "cpu, cuda"]),
        (["--fsdp-start-method=fork"], ["--fsdp-start-method='fork'", "forkserver, spawn"]),
        (["--fsdp-report=nowhere/report.json"], ["report.json", "does not exist"]),
        (["--fsdp-report=."], ["is a folder"]),
        (["--fsdp-report=/dev/null"], ["must be a regular file"]),
        (["--fsdp-report=/proc/report.json"], ["/proc/report.json", "cannot be written"]),
        (["--fsdp-ledger=nowhere.toml"], ["nowhere.toml", "does not exist"]),
    ],
)
def test_bad_options(matrix: Project, arguments: list[str], parts: list[str]) -> None:
    message = refused(matrix, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("argument", ["--fsdp-models=lama", "--fsdp-seed=one", "--fsdp-report=."])
def test_bad_options_start_no_worker(matrix: Project, argument: str) -> None:
    refused(matrix, "-n2", argument)


def test_read_only_report(matrix: Project) -> None:
    report = matrix.path / "report.json"
    report.write_text("old")
    report.chmod(0o444)
    assert "read-only" in refused(matrix, "--fsdp-models=llama", "--fsdp-report=report.json")
    assert report.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[[entry", ["is not TOML"]),
        ("[entries]", ["unknown top-level keys ['entries']"]),
        (LEDGER_ENTRY + "model = ['llama']", ["entry 'a-cause'", "unknown keys ['model']"]),
        (LEDGER_ENTRY.replace("id =", "link2 ="), ["entry number 1", "unknown keys"]),
        (LEDGER_ENTRY.replace('id = "a-cause"', ""), ["entry number 1", "id is missing"]),
        (LEDGER_ENTRY.replace("2025-01-31", '"soon"'), ["entry 'a-cause'", "date='soon'"]),
        (LEDGER_ENTRY.replace('"torch"', '"me"'), ["fault_of='me'", "transformers, torch, backend, kit"]),
        (LEDGER_ENTRY + "match = '('", ["match='('", "regular expression"]),
        (LEDGER_ENTRY + "models = []", ["models=[]", "must be a list"]),
        (LEDGER_ENTRY.replace("link", "# link"), ["link or reproduction is missing"]),
        (LEDGER_ENTRY * 2, ["'a-cause'", "there twice"]),
    ],
)
def test_bad_ledgers_name_file_and_entry(matrix: Project, text: str, parts: list[str]) -> None:
    (matrix.path / "known.toml").write_text(text)
    message = refused(matrix, "--fsdp-ledger=known.toml")
    assert all(part in message for part in ["known.toml", *parts]), message


def test_ini_keys_are_checked_too(matrix: Project) -> None:
    with (matrix.path / "pyproject.toml").open("a") as file:
        file.write('\nfsdp_backend = "none"\n')
    assert "'none'" in refused(matrix)
    # the command line comes first
    matrix.run("--fsdp-backend=reference", "--fsdp-models=llama", "-k", "dcp").assert_outcomes(passed=1)


def test_ini_keys_reach_the_engine(matrix: Project) -> None:
    (matrix.path / "known.toml").write_text(LEDGER_ENTRY + "models = ['gpt2']")
    with (matrix.path / "pyproject.toml").open("a") as file:
        file.write(
            '\nfsdp_models = "llama,gpt2"\nfsdp_seed = "7"\nfsdp_deadline = "9.5"\nfsdp_report = "ini.json"\n'
            'fsdp_ledger = ["known.toml"]\n'
        )
    result = matrix.run("-k", "dcp")
    assert matrix.calls()[0][2:] == ("reference", "7", "9.5")
    assert matrix.rows("ini.json") == {("gpt2", "dcp", "default"): "xpassed", ("llama", "dcp", "default"): "passed"}
    result.assert_outcomes(passed=1, failed=1)
    options = matrix.report("ini.json")["environment"]["options"]
    assert options["seed"] == 7
    assert options["models"] == ["llama", "gpt2"]


def test_custom_backend_and_fault(matrix: Project) -> None:
    matrix.pytester.makepyfile(
        mine="""
        class Backend:
            def load(self): ...
            make_optimizer = train_step = save = load

        class Fault: ...
        """
    )
    matrix.pytester.syspathinsert()
    result = matrix.run("--fsdp-backend=mine:Backend", "--fsdp-fault=mine:Fault", "--fsdp-models=llama", "-k", "dcp")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*backend mine:Backend*ARMED FAULT mine:Fault"])


def test_full_disk_leaves_the_old_report(matrix: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    report = matrix.path / "report.json"
    report.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fsdp_testkit.plugin.summary.write_report", full)
    result = matrix.run("--fsdp-models=llama", "-k", "dcp", "--fsdp-report=report.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["ERROR fsdp_testkit: --fsdp-report=*could not be written: No space left on device*"])
    assert report.read_text() == "old"
