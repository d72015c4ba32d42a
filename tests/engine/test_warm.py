"""What ranks are forked from holds what they would each do first, and nothing that could reach a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.tests import auto_case
from fsdp_testkit.ranks import Job


def replies(engine: Engine, target: str, world_size: int, **fields: Any) -> list[Any]:
    """Run a target on the engine's harness; return what each rank returned."""
    engine._start()
    assert engine._harness is not None
    report = engine._harness.run(Job(target=f"engine.warm_targets:{target}", world_size=world_size, **fields))
    assert report.outcome == "passed", report.failure and report.failure.render()
    report.discard()
    return [reply.value for reply in report.replies]


def test_ranks_import_nothing_while_they_train(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=True))
    case = auto_case(engine, work, "auto_vs_ddp")
    work.prepare([case])
    args = {"case": case.to_json(), "checkpoint": str(work.checkpoint)}
    late = replies(engine, "imports", 2, args=args)
    # torch's profiler asks for this one, whose import costs nothing, when a profile begins
    assert [set(names) - {"torch.profiler._cupti_monitor"} for names in late] == [set(), set()]


def test_a_rehearsal_leaves_nothing_of_its_groups(engine: Engine) -> None:
    (left,) = replies(engine, "rehearsed", 1, comm="none")
    built_for_devices = torch.accelerator.current_accelerator(check_available=False) is not None
    assert left == {
        "done": not built_for_devices,
        "threads": 1,
        "group": False,
        "cached": 0,
        "meshes": [],
        "drawn": False,
        "hook": True,
    }


def test_ranks_need_not_look_for_sources(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=True))
    case = auto_case(engine, work, "auto_vs_ddp")
    work.prepare([case])  # warms it
    ((known, new),) = replies(engine, "sources", 1, comm="none", args={"case": case.to_json()})
    assert min(known) > 0
    assert new == [0, 0]


def test_traces_of_ranks_need_no_look_at_the_disk(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=True))
    case = auto_case(engine, work, "auto_vs_ddp")
    work.prepare([case])
    args = {"case": case.to_json(), "checkpoint": str(work.checkpoint)}
    for found in replies(engine, "traces", 2, args=args):
        assert found["taken"] > 10
        assert found["files"] == []


@pytest.mark.parametrize(
    ("model", "frozen"), [("llama", []), ("roformer", ["roformer.encoder.embed_positions.weight"])]
)
def test_what_a_constructor_freezes_is_known_to_ddp(engine: Engine, model: str, frozen: list[str]) -> None:
    work = engine.work(ModelSpec(model_type=model, tie=False))
    layout = Layout(kind="ddp", replicate=2)
    case = replace(auto_case(engine, work, "auto_vs_ddp"), backend="ddp", layout=layout, steps=1)
    work.prepare([case])
    args = {"case": case.to_json(), "checkpoint": str(work.checkpoint)}
    for before, after, names in replies(engine, "constructors", 2, args=args):
        assert before == after > 0
        assert names == frozen


def test_no_rehearsal_in_a_group(engine: Engine) -> None:
    assert all("in a process group" in error for error in replies(engine, "rehearsed_in_a_group", 2))


def test_where_ranks_are_forked_from_has_one_thread(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="gpt2"))
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])  # warms it
    (server,) = replies(engine, "parent", 1, comm="none")
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
