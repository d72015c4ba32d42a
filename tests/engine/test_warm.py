"""What ranks are forked from holds what they would each do first, and nothing that could reach a test."""

from __future__ import annotations

from pathlib import Path

import torch

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.tests import auto_case
from fsdp_testkit.ranks import Harness, Job


def harness_of(engine: Engine) -> Harness:
    engine._start()
    assert engine._harness is not None
    return engine._harness


def test_ranks_import_nothing_while_they_train(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="llama", tie=True))
    case = auto_case(engine, work, "auto_vs_ddp")
    work.prepare([case])
    args = {"case": case.to_json(), "checkpoint": str(work.checkpoint)}
    report = harness_of(engine).run(Job(target="engine.warm_targets:imports", args=args, world_size=2))
    assert report.outcome == "passed", report.failure and report.failure.render()
    # torch's profiler asks for this one, whose import costs nothing, when a profile begins
    late = [set(reply.value) - {"torch.profiler._cupti_monitor"} for reply in report.replies]
    assert late == [set(), set()]
    report.discard()


def test_a_rehearsal_leaves_nothing_of_its_groups(engine: Engine) -> None:
    report = harness_of(engine).run(Job(target="engine.warm_targets:rehearsed", comm="none", world_size=1))
    assert report.outcome == "passed", report.failure and report.failure.render()
    built_for_devices = torch.accelerator.current_accelerator(check_available=False) is not None
    assert report.replies[0].value == {
        "done": not built_for_devices,
        "threads": 1,
        "group": False,
        "cached": 0,
        "meshes": [],
        "drawn": False,
        "hook": True,
    }
    report.discard()


def test_no_rehearsal_in_a_group(engine: Engine) -> None:
    report = harness_of(engine).run(Job(target="engine.warm_targets:rehearsed_in_a_group", world_size=2))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert all("in a process group" in reply.value for reply in report.replies)
    report.discard()


def test_where_ranks_are_forked_from_has_one_thread(engine: Engine) -> None:
    work = engine.work(ModelSpec(model_type="gpt2"))
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])  # warms it
    report = harness_of(engine).run(Job(target="engine.warm_targets:parent", comm="none", world_size=1))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert len(list(Path(f"/proc/{report.replies[0].value}/task").iterdir())) == 1
    report.discard()
