"""Jobs, stacks, and the verdict: pure functions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.ranks import Job, RankReply, pick_comm, stacks
from fsdp_testkit.ranks.link import Store
from fsdp_testkit.ranks.spec import rank_spec
from fsdp_testkit.ranks.stacks import (
    is_consequence,
    is_timeout,
    is_whole,
    native_error,
    own_part,
    sits_in,
    threads,
    waits_for_others,
)
from fsdp_testkit.ranks.verdict import explain, judge

STORE = Store(None, "127.0.0.1", 29500)

CLOSED = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:35245"

IN_REDUCE = """Thread 0x00007fa34e675b81 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007fa34e675b80 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 3252 in all_gather
  File "/venv/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/venv/torch/distributed/distributed_c10d.py", line 3100 in all_gather_object
  File "/venv/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/train.py", line 12 in reduce
  File "<string>", line 4 in <module>
"""
IN_HOOK = """Current thread 0x00007fa34e675b80 (most recent call first):
  File "/home/me/model.py", line 7 in forward
  File "/venv/torch/nn/modules/module.py", line 1 in _call_impl
  File "/venv/torch/distributed/fsdp/_fully_shard/_fsdp_state.py", line 62 in fsdp_hook_wrapper
"""
IN_FSDP = """Current thread 0x00007fa34e675b80 (most recent call first):
  File "/venv/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", line 340 in foreach_all_gather_copy_out
  File "/venv/torch/utils/_contextlib.py", line 120 in decorate_context
  File "/venv/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py", line 300 in wait_for_unshard
  File "/home/me/train.py", line 9 in step
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "no colon"},
        {"target": "__main__:main"},
        {"target": "a:b:c"},
        {"target": ""},
        {"device": "tpu"},
        {"comm": "mpi"},
        {"comm": "nccl"},
        {"world_size": 0},
        {"world_size": True},
        {"world_size": 2.0},
        {"deadline": 0},
        {"deadline": -1.0},
        {"deadline": math.inf},
        {"deadline": math.nan},
        {"deadline": "60"},
        {"deadline": True},
        {"stall": 0},
        {"stall": math.nan},
        {"min_observations": -1},
        {"env": {"A": 1}},
        {"env": {"A=B": "1"}},
        {"env": {"": "1"}},
        {"args": {"a": object()}},
        {"args": {"a": (1, 2)}},
        {"args": {"a": {1: 2}}},
        {"args": [1]},
    ],
)
def test_impossible_jobs_are_refused_with_the_name_of_the_field(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        Job(**{"target": "a.b:c", **changes})  # type: ignore[arg-type]


def test_a_fake_group_needs_one_process_for_any_world_size() -> None:
    assert Job(target="a:b", comm="fake", world_size=8).processes == 1
    assert Job(target="a:b", comm="none", world_size=3).processes == 3


@pytest.mark.parametrize(
    ("device", "world_size", "gpus", "comm", "reason"),
    [
        ("cpu", 2, 8, "gloo", "CPU"),
        ("cuda", 2, 2, "nccl", "own GPU"),
        ("cuda", 2, 8, "nccl", "own GPU"),
        ("cuda", 2, 1, "gloo", "2 ranks share 1 GPU"),
        ("cuda", 1, 1, "nccl", "own GPU"),
    ],
)
def test_nccl_wants_a_gpu_for_each_rank(device: str, world_size: int, gpus: int, comm: str, reason: str) -> None:
    chosen, text = pick_comm(device, world_size, gpus)
    assert chosen == comm
    assert reason in text


@pytest.mark.parametrize(("device", "world_size", "gpus"), [("cuda", 2, 0), ("tpu", 1, 1), ("cpu", 0, 0)])
def test_no_group_can_be_picked(device: str, world_size: int, gpus: int) -> None:
    with pytest.raises(UsageError):
        pick_comm(device, world_size, gpus)


def test_the_thread_that_got_the_signal_comes_first() -> None:
    first, second = threads(IN_REDUCE)
    assert first[0].function == "all_gather"
    assert second[0].function == "wait"


def test_the_outermost_name_of_a_collective_is_told() -> None:
    assert sits_in(IN_REDUCE) == ("all_gather_object (distributed_c10d.py:3100)", "reduce (train.py:12)")


def test_user_code_under_a_hook_is_no_collective() -> None:
    assert sits_in(IN_HOOK) == ("", "forward (model.py:7)")


def test_a_wait_inside_fsdp_is_told() -> None:
    assert sits_in(IN_FSDP) == ("foreach_all_gather_copy_out (_fsdp_collectives.py:340)", "step (train.py:9)")


@pytest.mark.parametrize("text", ["", "rubbish", 'Thread 0x1 (most recent call first):\n  File "x'])
def test_a_broken_stack_says_nothing(text: str) -> None:
    assert sits_in(text) == ("", "")


@pytest.mark.parametrize(
    ("dump", "whole"),
    [(IN_REDUCE, True), (IN_REDUCE[:-40], False), (IN_HOOK, False), (IN_HOOK + "  ...\n", True), ("", False)],
)
def test_a_dump_is_whole_with_its_outermost_frame(dump: str, whole: bool) -> None:
    assert is_whole(dump) is whole


def test_frames_of_the_harness_are_not_shown() -> None:
    assert "<string>" not in own_part(IN_REDUCE)
    assert "train.py" in own_part(IN_REDUCE)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "hi\nterminate called after throwing an instance of 'X'\n  what():  bad\nmore\n",
            "instance of 'X' what():  bad",
        ),
        ("Fatal Python error: Segmentation fault\n\nThread 0x1\n", "Fatal Python error: Segmentation fault"),
        ("a\nOSError: no space\nbye\n", "OSError: no space"),
        ("a\nb\n", ""),
        ("", ""),
    ],
)
def test_native_errors_are_found_in_logs(log: str, line: str) -> None:
    found = native_error(log)
    assert found.endswith(line)
    assert bool(found) == bool(line)


def test_a_closed_connection_is_a_consequence() -> None:
    assert is_consequence(CLOSED)
    assert not is_consequence("ValueError: shapes differ")


def raised(rank: int, error: str = "ValueError: boom", **more: object) -> RankReply:
    more = {"traceback": f'File "x.py", line 3\n{error}', "consequence": is_consequence(error), **more}
    return RankReply(rank=rank, status="raised", error=error, **more)  # type: ignore[arg-type]


def ok(rank: int, observations: int = 1) -> RankReply:
    return RankReply(rank=rank, status="ok", observations=observations)


JOB = Job(target="pkg.mod:function", world_size=3, name="train llama", deadline=7)


def test_all_well() -> None:
    assert judge(JOB, [ok(0), ok(1)], [1, 1]) == ("passed", None)


def test_a_consequence_that_comes_first_is_not_the_cause() -> None:
    outcome, failure = judge(JOB, [raised(0, CLOSED), raised(1), raised(2, CLOSED)], [1.0, 2.0, 1.5])
    assert outcome == "failed"
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("exception", 1)
    assert failure.summary == "train llama: rank 1 of 3 raised ValueError: boom"
    text = failure.render()
    assert text.index("rank 1 raised") < text.index("ranks 0, 2 raised")
    assert text.count("a consequence of another rank's end") == 1


def test_consequences_alone_still_name_a_rank() -> None:
    _, failure = judge(JOB, [raised(0, CLOSED), raised(1, CLOSED)], [2.0, 1.0])
    assert failure is not None
    assert failure.first_rank == 1


def test_a_death_beats_an_error_noticed_a_moment_before() -> None:
    dead = RankReply(rank=1, status="died", signal="SIGKILL")
    _, failure = judge(JOB, [raised(0, "RuntimeError: peer"), dead], [1.00, 1.02])
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("signal", 1)
    assert "SIGKILL" in failure.summary


def test_equal_tracebacks_are_folded() -> None:
    _, failure = judge(JOB, [raised(rank, f"ValueError: rank {rank}") for rank in range(3)], [3, 1, 2])
    assert failure is not None
    assert failure.first_rank == 1
    assert failure.render().count('File "x.py"') == 1
    assert "ranks 0-2 raised ValueError: rank 1 <- rank 1 first" in failure.render()


def test_the_rank_that_is_elsewhere_is_to_blame_for_a_hang() -> None:
    waiting = RankReply(rank=0, status="hung", stack="s", collective="all_reduce (c.py:1)", error="a (b.py:1)")
    asleep = RankReply(rank=1, status="hung", stack="s", error="nap (b.py:2)")
    _, failure = judge(JOB, [waiting, asleep], [7, 7])
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("hang", 1)
    assert "no reply from ranks 0-1 of 2 within 7 s" in failure.summary
    assert "rank 1 is at nap (b.py:2)" in failure.summary
    assert "rank 0 waits in all_reduce (c.py:1), called in a (b.py:1)" in failure.summary


def test_a_rank_that_returned_is_to_blame_for_those_that_wait() -> None:
    waiting = RankReply(rank=0, status="hung", stack="s", collective="all_reduce (c.py:1)")
    _, failure = judge(JOB, [waiting, ok(1)], [7, 1])
    assert failure is not None
    assert failure.first_rank == 1
    assert "rank 1 had returned" in failure.summary


WATCHDOG = (
    "terminate called after throwing an instance of 'c10::DistBackendError' what():  [PG ID 0 PG GUID 0(default_pg) "
    "Rank 0] Process group watchdog thread terminated with exception: [Rank 0] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=2, OpType=ALLREDUCE, NumelIn=1, Timeout(ms)=8000) ran for 8010 milliseconds"
)


def test_a_watchdog_that_gives_up_is_a_hang_and_blames_who_did_not_come() -> None:
    waited = RankReply(rank=0, status="died", signal="SIGABRT", error=WATCHDOG)
    asleep = RankReply(rank=1, status="stopped", stack="s", error="nap (b.py:2)")
    inside = RankReply(rank=2, status="stopped", stack="s", collective="all_reduce (c.py:1)", error="a (b.py:1)")
    _, failure = judge(JOB, [waited, asleep, inside], [8, 11, 11])
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("hang", 1)
    assert failure.summary.startswith("train llama: rank 0 of 3 gave up waiting: terminate called")
    assert "rank 1 was stopped after the failure; it is at nap (b.py:2)" in failure.summary
    _, failure = judge(JOB, [waited, RankReply(rank=1, status="raised", error="ValueError: boom")], [8, 7])
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("exception", 1), "a real error is the cause"


@pytest.mark.parametrize(
    ("text", "late"),
    [
        (WATCHDOG, True),
        ("RuntimeError: [x.cc:78] Timed out waiting 1000ms for recv operation to complete", True),
        ("ValueError: timed out", False),
        (CLOSED, False),
    ],
)
def test_a_timeout_of_the_group_is_known(text: str, late: bool) -> None:
    assert is_timeout(text) is late


@pytest.mark.parametrize(
    ("stack", "waits"),
    [
        (IN_REDUCE, True),  # its other thread waits in the standard library
        (IN_REDUCE.replace("/usr/lib/python3.11", "/home/me"), False),
        (IN_HOOK, False),
        (IN_FSDP, True),
        ("", False),
    ],
)
def test_who_only_another_rank_can_wake(stack: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_STDLIB", "/usr/lib/python3.11/")
    assert waits_for_others(stack) is waits


def test_skips() -> None:
    skip = [RankReply(rank=rank, status="skipped", error="no GPU") for rank in range(2)]
    assert judge(JOB, skip, [1, 1]) == ("skipped", None)
    _, failure = judge(JOB, [ok(0), skip[1]], [1, 1])
    assert failure is not None
    assert (failure.kind, failure.first_rank) == ("lone_skip", 1)
    assert failure.summary == "train llama: rank 1 skipped (no GPU), rank 0 did not"


def test_success_without_observations_is_a_failure() -> None:
    outcome, failure = judge(JOB, [ok(0), ok(1, observations=0)], [1, 1])
    assert outcome == "failed"
    assert failure is not None
    assert failure.kind == "no_observation"
    assert "rank 1 of 2 reported success but made no observation" in failure.summary


def test_the_second_run_is_told_without_noise() -> None:
    options = "TensorOptions(dtype=float (default), device=cpu, memory_format=(nullopt))"
    text = (
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 0 is running collective: "
        f"CollectiveFingerPrint(OpType=ALLREDUCE, TensorShape=[2], TensorDeviceTypes={options} {options}), but Rank 1"
    )
    said = explain([raised(0, text), raised(1, CLOSED)], None)
    assert "OpType=ALLREDUCE, TensorShape=[2]), but Rank 1" in said
    assert "did not hang" in explain([ok(0)], None)


def test_what_ranks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def told(attempt: int = 0, **changes: object) -> dict[str, Any]:
        job = Job(**{"target": "a:b", "world_size": 2, "deadline": 10, **changes})  # type: ignore[arg-type]
        return json.loads(json.dumps(rank_spec(job, "id", attempt, tmp_path, tmp_path, STORE, 100.0)))

    cpu, cuda = told(), told(device="cuda", comm="nccl", env={"OMP_NUM_THREADS": "3"})
    assert cpu["env"]["OMP_NUM_THREADS"] == "1"
    assert cpu["env"]["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert "CUBLAS_WORKSPACE_CONFIG" not in cpu["env"]
    assert cuda["env"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert cuda["env"]["OMP_NUM_THREADS"] == "3"
    assert cpu["deadline"] == 110
    assert cpu["group_timeout"] > 10, "the deadline comes before the group's own timeout"
    assert told(attempt=1)["group_timeout"] > 10
    checked = told(attempt=1, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})
    assert checked["group_timeout"] < 10, "naming a rank that is missing needs the group's own timeout"
    assert cuda["group_timeout"] == 8, "NCCL's watchdog comes before the deadline: it says what each rank was in"
    assert [told()["recorded"], told(attempt=1)["recorded"], cuda["recorded"]] == [False, True, True]
    assert str(tmp_path) in cpu["path"]
