"""Models with code of their own: run in all kinds of ranks by those who agreed, and by nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own_folder import CONFIG, write_folder
from plugin_project import Project, refused

from fsdp_testkit.cli import main
from fsdp_testkit.core.case import Case, ModelSpec, replay_command
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Engine, Settings, consent
from fsdp_testkit.models.build import resolve
from fsdp_testkit.plugin import source
from fsdp_testkit.plugin.matrix import model_class
from fsdp_testkit.ranks import Harness, Job
from fsdp_testkit.reporting.failure import replay_command as command_of

MODEL = "AutoModelForCausalLM"


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(model_type="folded", config=(folder / "config.json").read_text(), code=str(folder))


def case_of(folder: Path) -> Case:
    layout = Layout(kind="fsdp", shard=2)
    return Case(model=spec_of(folder), layout=layout).with_options(test="sharding_structure")


def test_without_the_option_nothing_is_run(matrix: Project, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", mark=tmp_path / "ran")
    message = refused(matrix, f"--fsdp-models={folder}")
    assert all(part in message for part in (str(folder), "run the code of that folder", "--fsdp-trust-remote-code"))
    refused(matrix, "-n2", f"--fsdp-models=llama,{folder}")
    with pytest.raises(UsageError, match=f"{folder}.*--fsdp-trust-remote-code"):
        Engine(Settings()).run_test(spec_of(folder), "sharding_structure", "untied")
    with pytest.raises(UsageError, match="nobody agreed"):
        resolve(Case.from_json(case_of(folder).to_json()).model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"auto_map": {"AutoConfig": "configuration_folded.FoldedConfig"}}, f"must name the class {MODEL}"),
        ({"auto_map": ["modeling_folded.FoldedForCausalLM"]}, f"must name the class {MODEL}"),
        ({"auto_map": {MODEL: "somebody/model--modeling.Folded"}}, "another repository is never fetched"),
        ({"auto_map": {MODEL: "modeling_folded"}}, "must look like 'modeling_file.Class'"),
        ({"auto_map": {MODEL: "../modeling_folded.Folded"}}, "must look like 'modeling_file.Class'"),
        ({"auto_map": {MODEL: "modeling_gone.Folded"}}, "needs the file modeling_gone.py"),
        ({"model_type": None}, "with a model_type"),
    ],
)
def test_folders_that_lack_something(matrix: Project, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    folder = write_folder(tmp_path / "mine", mark=tmp_path / "ran", **changes)
    assert part in refused(matrix, f"--fsdp-models={folder}", "--fsdp-trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_config(matrix: Project, tmp_path: Path) -> None:
    assert "must be a folder with a config.json" in refused(matrix, f"--fsdp-models={tmp_path}")


@pytest.mark.parametrize("agreed", ["option", "ini"])
def test_the_parent_names_the_code_and_does_not_run_it(matrix: Project, tmp_path: Path, agreed: str) -> None:
    folder = write_folder(tmp_path / "my-model.v1", mark=tmp_path / "ran")
    arguments = [f"--fsdp-models={folder}", "-k", "dcp", "--fsdp-report=report.json"]
    if agreed == "option":
        arguments.append("--fsdp-trust-remote-code")
    else:
        with (matrix.path / "pyproject.toml").open("a") as file:
            file.write("\nfsdp_trust_remote_code = true\n")
    result = matrix.run(*arguments)
    result.assert_outcomes(passed=1)
    (call,) = [call for call in matrix.calls() if call[1] == "run"]
    assert call[2:7] == ("folded", "dcp", "default", "", "")
    assert json.loads(call[7]) == CONFIG
    assert matrix.report()["environment"]["options"]["trust_remote_code"] is True
    assert not (tmp_path / "ran").exists()


def test_paths_without_code_of_their_own(tmp_path: Path) -> None:
    """A folder is then as good as its config.json; and the config.json of a folder with code is refused."""
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text('{"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4}')
    by_folder, by_file = (source.resolve(model_class(str(path), __name__)()) for path in (plain, plain / "config.json"))
    assert by_folder == by_file
    assert by_folder.model_type == "llama"
    assert not by_folder.code
    own = write_folder(tmp_path / "own", mark=tmp_path / "ran")
    with pytest.raises(UsageError, match=f"its classes are code of its folder, so name that: '{own}'"):
        source.resolve(model_class(str(own / "config.json"), __name__)())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"code": "here"}, "absolute path"),
        ({"code": 5}, "absolute path"),
        ({"code": "/a", "config": ""}, "needs a config"),
        ({"code": "/a", "model_class": "a:B"}, "names the classes itself"),
    ],
)
def test_impossible_specs(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        ModelSpec(**{"model_type": "folded", "config": "{}", **fields})


def test_a_replay_needs_consent_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "it's mine", mark=tmp_path / "ran")
    case = case_of(folder).to_json()
    assert replay_command(case).startswith("python -m fsdp_testkit replay --trust-remote-code '{")
    assert main(["replay", case]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert "say --trust-remote-code" in error
    assert not (tmp_path / "ran").exists()


MIXINS = """
from fsdp_testkit import FSDPTesterMixin

class TestOwn(FSDPTesterMixin):
    config = {folder!r}
    fsdp_trust_remote_code = True
    fsdp_tests = ("sharding_structure", "auto_vs_ddp", "save_load")

class TestNotAgreed(FSDPTesterMixin):
    config = {folder!r}
    fsdp_tests = ("dcp",)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the mixin's classes were run on real ranks, with a home and a TMPDIR of its own."""
    place = tmp_path_factory.mktemp("own-code")
    folder = write_folder(place / "mine", mark=place / "ran")
    (place / "test_mine.py").write_text(MIXINS.format(folder=str(folder)))
    (place / "tmp").mkdir()
    env = {**os.environ, "HF_HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(place)]
    done = subprocess.run(
        [*command, "--fsdp-report", str(place / "report.json"), str(place / "test_mine.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    (place / "out.txt").write_text(done.stdout + done.stderr)
    return place


def test_forked_ranks_run_it(ran: Path) -> None:
    rows = [Result(**raw) for raw in json.loads((ran / "report.json").read_text())["results"]]
    good = [row for row in rows if row.outcome == "passed"]
    assert {(row.test, row.variant) for row in good} == {
        (test, variant) for test in ("sharding_structure", "auto_vs_ddp", "save_load") for variant in ("untied", "tied")
    }, (ran / "out.txt").read_text()
    assert all(row.checks > 100 for row in good)
    assert all(command_of(row).startswith("python -m fsdp_testkit replay --trust-remote-code ") for row in good)
    (bad,) = [row for row in rows if row.outcome != "passed"]
    assert bad.outcome == "error"
    assert "say --fsdp-trust-remote-code" in bad.reason
    assert (ran / "ran").exists()


def test_nothing_of_it_is_left(ran: Path) -> None:
    assert not (ran / "home" / "modules").exists()
    assert not [path for path in (ran / "tmp").rglob("*") if "folded" in path.name or "fsdp_testkit" in path.name]
    assert sorted(path.name for path in (ran / "mine").iterdir()) == [
        "config.json",
        "configuration_folded.py",
        "modeling_folded.py",
    ]


def test_a_replay_with_consent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "mine", mark=tmp_path / "ran")
    assert main(["replay", case_of(folder).to_json(), "--trust-remote-code"]) == 0
    assert "folded: sharding_structure on fsdp(2) with backend reference: passed" in capsys.readouterr().out
    assert (tmp_path / "ran").exists()


def test_spawned_ranks_run_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", mark=tmp_path / "ran")
    with Harness(start_method="spawn") as harness:
        harness.env.update(consent(harness.folder))
        job = Job(target="own_targets:parameters", args={"case": case_of(folder).to_json()}, world_size=2, comm="none")
        report = harness.run(job)
        assert report.failure is None, report.failure.render()
        own = harness.folder
    classes, sizes, places = zip(*(reply.value for reply in report.replies), strict=True)
    assert set(classes) == {"FoldedForCausalLM"}
    assert min(sizes) == max(sizes) > 1000
    assert {Path(place).parent for place in places} == {own}
    assert not own.exists()
