"""The flight recorder: what it leaves on each rank, and which collectives do not match."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.ranks import Harness, Job, recorder
from fsdp_testkit.ranks.recorder import Entry, mismatch, read


def entry(number: int, what: str = "all_reduce(Float[2])", *, group: str = "default_pg", done: bool = True) -> Entry:
    return Entry(group=group, number=number, what=what, place="", done=done)


DONE, WAITS = entry(1), entry(2, done=False)
CALL = "all_reduce(Float[2])"
ALONE = f"collective 2 of default_pg was not entered by all: rank 0 {CALL}, called in here; the record of rank 1"


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({0: [DONE], 1: [DONE]}, ""),
        ({0: [DONE, WAITS], 1: [DONE, WAITS]}, ""),
        ({0: [DONE, WAITS]}, ""),
        ({0: [DONE, WAITS], 1: [DONE]}, f"{ALONE} ends with collective 1 of default_pg: {CALL}, which had ended"),
        ({0: [WAITS], 1: []}, f"{ALONE} is empty"),
        (
            {0: [DONE, WAITS], 1: [DONE, entry(2, "all_gather(Float[2])", done=False)]},
            f"collective 2 of default_pg differs: rank 0 {CALL}, called in here, rank 1 all_gather(Float[2])",
        ),
        (
            {0: [WAITS], 1: [entry(1, group="other", done=False)]},
            f"{ALONE} ends with collective 1 of other: {CALL}, which it waits in",
        ),
        # a full buffer has dropped the first ones of one rank
        ({0: [DONE, entry(2), entry(3)], 1: [entry(2), entry(3)]}, ""),
    ],
)
def test_the_first_collectives_that_do_not_match(ranks: dict[int, list[Entry]], said: str) -> None:
    assert mismatch(ranks, {0: "here"}) == said


DUMP: dict[str, Any] = {
    "version": "2.10",
    "entries": [
        {
            "collective_seq_id": 3,
            "frames": [
                {"filename": "/venv/torch/distributed/distributed_c10d.py", "line": 1, "name": "all_reduce"},
                {"filename": "/home/me/train.py", "line": 7, "name": "step"},
            ],
            "input_dtypes": ["Float"],
            "input_sizes": [[2, 3]],
            "is_p2p": False,
            "process_group": ("0", "default_pg"),
            "profiling_name": "nccl:all_reduce",
            "state": "started",
            "retired": False,
        },
        {"is_p2p": True},
    ],
}


def test_a_dump_of_nccl_is_read(tmp_path: Path) -> None:
    (tmp_path / "collectives-rank0").write_bytes(pickle.dumps(DUMP, protocol=2))
    assert read(tmp_path, 2) == {
        0: [Entry(group="default_pg", number=3, what="all_reduce(Float[2, 3])", place="step (train.py:7)", done=False)]
    }


@pytest.mark.parametrize("data", [b"", b"rubbish", b"{", pickle.dumps([1]), pickle.dumps({"entries": [{}]})])
def test_a_broken_dump_is_no_dump(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "collectives-rank0").write_bytes(data)
    assert read(tmp_path, 1) == {}


def test_a_dump_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "collectives-rank0").write_bytes(pickle.dumps({"entries": [Evil()]}))
    assert read(tmp_path, 1) == {}
    assert not (tmp_path / "evil").exists()


def test_torch_still_has_the_private_function() -> None:
    import torch._C._distributed_c10d as c10d

    assert recorder.available()
    assert isinstance(json.loads(c10d._dump_fr_trace_json()), dict)


def test_nccl_is_asked_through_its_pipe(tmp_path: Path) -> None:
    recorder.ask_nccl(tmp_path, 0)  # nobody listens
    os.mkfifo(tmp_path / "dump-rank0.pipe")
    recorder.ask_nccl(tmp_path, 0)
    pipe = os.open(tmp_path / "dump-rank0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    recorder.ask_nccl(tmp_path, 0)
    assert os.read(pipe, 10) == b"1\n"
    os.close(pipe)


def test_where_nccl_leaves_its_record(tmp_path: Path) -> None:
    gloo, nccl = (recorder.environment(tmp_path, comm) for comm in ("gloo", "nccl"))
    assert nccl["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "collectives-rank")
    assert nccl["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert nccl["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] == str(tmp_path / "dump-rank")
    assert not any("NCCL" in name for name in gloo)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("groups", "collective 1 of group 1 was not entered by all: rank 0 all_reduce(Float[1]), called in groups ("),
        ("returns_early", "collective 2 of default_pg was not entered by all: rank 0 all_reduce(Float[1]), called in "),
    ],
)
def test_a_job_that_cannot_go_on_is_explained(harness: Harness, target: str, text: str) -> None:
    job = Job(target=f"fault_targets:{target}", args={"rank": 1}, world_size=2, stall=0.5)
    report = harness.run(job)
    assert report.failure is not None
    assert f"run again with its collectives recorded: {text}" in report.failure.render()
    assert report.seconds < 30
    report.discard()
