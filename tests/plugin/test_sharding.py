"""The parts of a sharded matrix are complete, disjoint, balanced, and the same on every machine."""

from __future__ import annotations

import json

import pytest
from plugin_project import Project

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.plugin.sharding import parse_shard, split

MODELS = [f"model{number}" for number in range(23)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 30])
def test_parts_are_complete_and_disjoint(count: int) -> None:
    parts = split(MODELS, {"model3": 50.0, "model7": 2.5}, count)
    assert len(parts) == count
    assert sorted(model for part in parts for model in part) == sorted(MODELS)
    assert parts == split(MODELS, {"model7": 2.5, "model3": 50.0}, count)


def test_durations_balance_the_parts() -> None:
    seconds = {model: float(2 ** (number % 5)) for number, model in enumerate(MODELS)}
    loads = [sum(seconds[model] for model in part) for part in split(MODELS, seconds, 4)]
    assert max(loads) <= sum(seconds.values()) / 4 * 4 / 3, "longest first is within a third of the best split"
    long = split(MODELS, dict.fromkeys(MODELS, 1.0) | {"model5": 1000.0}, 3)
    assert {"model5"} in long, "one model that takes longer than all others has a part of its own"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_wrong_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must look like 3/8"):
        parse_shard(text)


def test_two_machines_run_everything_once(matrix: Project) -> None:
    seen: list[str] = []
    for index in (1, 2):
        result = matrix.run("--fsdp-models=llama,gpt2,phi", f"--fsdp-shard={index}/2", f"--fsdp-report=r{index}.json")
        assert result.ret == 0
        seen += {model for model, _, _ in matrix.rows(f"r{index}.json")}
    assert sorted(seen) == ["gpt2", "llama", "phi"]


def test_durations_come_from_a_report(matrix: Project) -> None:
    rows = [
        {"model_type": "llama", "seconds": 100.0, "outcome": "passed"},
        {"model_type": "gpt2", "seconds": 1.0, "outcome": "passed"},
        {"model_type": "phi", "seconds": 1.0, "outcome": "passed"},
    ]
    document = {"schema": "fsdp_testkit.report/1", "environment": {}, "results": rows}
    (matrix.path / "old.json").write_text(json.dumps(document))
    arguments = ["--fsdp-models=llama,gpt2,phi", "--fsdp-durations=old.json", "--fsdp-report=new.json"]
    assert matrix.run(*arguments, "--fsdp-shard=1/2").ret == 0
    assert {model for model, _, _ in matrix.rows("new.json")} == {"llama"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--fsdp-shard=9/8"], "must look like 3/8"), (["--fsdp-durations=nowhere.json"], "does not exist")],
)
def test_bad_input_is_refused(matrix: Project, arguments: list[str], text: str) -> None:
    result = matrix.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert text in result.stderr.str()
    assert not matrix.calls()
