"""What real ranks do, and what the report says about it."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import pytest

from fsdp_testkit.ranks import Harness, Job, JobFailure, JobReport


def run(harness: Harness, name: str, *, deadline: float = 20.0, explain: bool = False, **args: object) -> JobReport:
    job = Job(target=f"targets:{name}", world_size=2, deadline=deadline, args=args)
    begun = time.monotonic()
    report = harness.run(job, explain_hangs=explain)
    assert time.monotonic() - begun <= deadline * (2 if explain else 1) + 5 * (2 if explain else 1)
    assert len(report.replies) == 2
    return report


def failed(report: JobReport, kind: str, rank: int) -> JobFailure:
    assert report.outcome == "failed"
    assert report.failure is not None
    text = report.failure.render()
    assert (report.failure.kind, report.failure.first_rank) == (kind, rank), text
    assert "\n" not in report.failure.summary
    assert str(report.replies[0].log) in text
    report.discard()
    assert not report.folder.exists()
    return report.failure


def test_success(harness: Harness) -> None:
    report = run(harness, "good", extra={"a": [1, None]})
    assert report.outcome == "passed"
    assert report.failure is None
    assert report.notes == []
    assert [reply.status for reply in report.replies] == ["ok", "ok"]
    assert report.replies[1].value == {"total": [3.0], "extra": {"a": [1, None]}, "rank": 1}
    assert report.replies[1].observations == 2
    assert report.replies[1].exitcode == 0
    assert "hello from 1" in report.replies[1].stderr
    assert (report.folder / "file1").read_text() == "x"
    report.discard()
    assert not report.folder.exists()


def test_four_ranks(harness: Harness) -> None:
    report = harness.run(Job(target="targets:good", world_size=4, deadline=30))
    assert [reply.value["total"] for reply in report.replies] == [[10.0]] * 4
    report.discard()


@pytest.mark.parametrize("slow", [None, 0, 3])
def test_ranks_leave_their_group_for_smaller_ones(harness: Harness, slow: int | None) -> None:
    args = {"sizes": [3, 2, 1], "slow": slow}
    report = harness.run(Job(target="targets:regroup", world_size=4, deadline=30, args=args))
    assert report.outcome == "passed", report.failure and report.failure.render()
    sums, worlds = [[6.0], [3.0], [1.0]], [[3, "3", "3"], [2, "2", "2"], [1, "1", "1"]]
    seen = [(reply.value["found"], reply.value["worlds"]) for reply in report.replies]
    assert seen == [(sums[:kept], worlds[:kept]) for kept in (3, 2, 1, 0)]
    report.discard()


@pytest.mark.parametrize(
    ("comm", "size", "text"),
    [
        ("gloo", 2, "world_size=2 must be from 1 to 1"),
        ("gloo", 0, "world_size=0 must be from 1 to 1"),
        ("none", 1, "comm='none': there is no process group to leave"),
    ],
)
def test_a_group_that_cannot_be_left(harness: Harness, comm: str, size: int, text: str) -> None:
    report = harness.run(Job(target="targets:regroup_refused", world_size=2, comm=comm, args={"size": size}))
    assert [reply.value for reply in report.replies] == [text] * 2
    report.discard()


@pytest.mark.parametrize(("how", "kind"), [("raise", "exception"), ("hang", "hang")])
def test_trouble_in_a_smaller_group_is_told_as_any(harness: Harness, how: str, kind: str) -> None:
    report = harness.run(
        Job(target="targets:regroup_and_fail", world_size=3, deadline=8, args={"how": how}), explain_hangs=False
    )
    assert report.outcome == "failed"
    assert report.failure is not None
    assert (report.failure.kind, report.failure.first_rank) == (kind, 0), report.failure.render()
    assert report.replies[2].status == "ok"
    report.discard()


def test_a_mismatch_before_a_change_of_group_is_noticed_as_any(harness: Harness) -> None:
    report = harness.run(Job(target="targets:regroup_too_early", world_size=3, deadline=60, stall=1.0))
    assert report.failure is not None
    text = report.failure.render()
    assert report.failure.kind == "hang"
    assert report.seconds < 30, text
    assert "rank 0 waits in all_reduce" in text
    assert "barrier" in text
    report.discard()


def test_ranks_see_the_parents_environment_and_path_of_now(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FROM_PARENT", "yes")
    monkeypatch.chdir(tmp_path)
    job = Job(target="targets:describe", world_size=2, env={"FROM_JOB": "1"}, deadline=30)
    report = harness.run(job)
    seen = report.replies[1].value
    assert seen["env"] == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "FROM_JOB": "1",
        "FROM_PARENT": "yes",
    }
    assert seen["cwd"] == str(tmp_path)
    assert seen["threads"] == 1
    assert seen["policies"] == [os.SCHED_BATCH]  # the threads of gloo's process group among them
    assert 0 < seen["left"] < 30
    assert "pytest" not in seen["modules"], "the parent's __main__ must not be imported again"
    assert "FROM_JOB" not in os.environ
    report.discard()


@pytest.mark.parametrize(("comm", "processes", "store"), [("fake", 1, False), ("none", 4, True)])
def test_no_process_group(harness: Harness, comm: str, processes: int, store: bool) -> None:
    report = harness.run(Job(target="targets:plain", world_size=4, comm=comm, deadline=30))
    assert [reply.value["store"] for reply in report.replies] == [store] * processes
    assert report.replies[0].value["world_size"] == 4
    report.discard()


def test_ranks_share_a_store_of_their_job(harness: Harness) -> None:
    for _ in range(2):
        report = run(harness, "stores")
        assert [reply.value for reply in report.replies] == [1, 0]
        report.discard()


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_an_exception_is_the_cause_and_the_closed_connection_is_not(harness: Harness, when: str) -> None:
    rank = 1
    report = run(harness, "raises", rank=rank, when=when)
    failure = failed(report, "exception", rank)
    wanted = "TypeError" if when == "inside" else "ValueError: boom"
    assert f"rank {rank} of 2 raised {wanted}" in failure.summary
    assert f"in raises\n{' ' * 4}" in report.replies[rank].traceback
    text = failure.render()
    assert text.index(f"rank {rank} raised") < text.index(f"rank {1 - rank} ")
    assert re.search(rf"rank {1 - rank} raised .*\(a consequence of another rank's end\)", text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("unpicklable", "UnpicklableError: 1 and 2"),
        ("silent", "SilentError: <its __str__ raised RuntimeError>"),
        ("evil", "EvilError: <its __str__ raised SystemExit>"),
        ("exit", "SystemExit: 0"),
        ("interrupt", "KeyboardInterrupt"),
        ("long", "ValueError: xxx"),
        ("surrogate", "ValueError: bad ? text"),
    ],
)
def test_odd_exceptions_arrive(harness: Harness, kind: str, text: str) -> None:
    failure = failed(run(harness, "raises", rank=1, kind=kind), "exception", 1)
    assert f"rank 1 of 2 raised {text}" in failure.summary


def test_equal_errors_of_all_ranks_are_told_once(harness: Harness) -> None:
    report = run(harness, "all_raise")
    assert report.failure is not None
    text = failed(report, "exception", report.failure.first_rank).render()
    assert "ranks 0-1 raised ValueError: same on rank" in text
    assert text.count("Traceback") == 1


@pytest.mark.parametrize(
    ("target", "text"),
    [("targets:missing", "AttributeError"), ("no.such.module:f", "ModuleNotFoundError: No module named 'no'")],
)
def test_a_target_that_does_not_exist(harness: Harness, target: str, text: str) -> None:
    report = harness.run(Job(target=target, world_size=2, deadline=20))
    assert report.failure is not None
    assert text in failed(report, "exception", report.failure.first_rank).summary


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        (0, "exit", "exited with status 0 before it replied"),
        (3, "exit", "exited with status 3 before it replied"),
        ("SIGKILL", "signal", "was ended by SIGKILL before it replied (out of memory?)"),
        ("SIGSEGV", "signal", "was ended by SIGSEGV before it replied: Fatal Python error: Segmentation fault"),
        ("null", "signal", "was ended by SIGSEGV before it replied: Fatal Python error: Segmentation fault"),
        ("terminate", "signal", "was ended by SIGABRT before it replied: terminate called after throwing"),
    ],
)
def test_a_death_is_a_named_failure(harness: Harness, how: int | str, kind: str, text: str) -> None:
    rank = 1
    report = run(harness, "ends", rank=rank, how=how)
    failure = failed(report, kind, rank)
    assert f"rank {rank} of 2 {text}" in failure.summary
    assert "last words" in failure.render()
    assert report.replies[rank].status == "died"
    assert report.replies[rank].exitcode == (how if isinstance(how, int) else None)


def test_a_native_abort_shows_its_text(harness: Harness) -> None:
    report = run(harness, "shapes")
    assert report.failure is not None
    failure = failed(report, "signal", report.failure.first_rank)
    assert "ended by SIGABRT" in failure.summary
    assert "Received data size doesn't match expected size" in failure.summary


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("aborts_after_success", "rank 1 was ended by signal 6 at exit, after it had reported its result"),
        ("hangs_after_success", "rank 1 did not end within 1 s after all had succeeded, and was killed"),
    ],
)
def test_trouble_after_success_is_a_note(harness: Harness, name: str, note: str) -> None:
    report = run(harness, name, rank=1)
    assert report.outcome == "passed"
    assert report.notes == [note]
    report.discard()


@pytest.mark.parametrize(
    ("rank", "how", "place"),
    [
        (1, "sleep", "rank 1 is at hangs (targets.py:"),
        (0, "loop", "rank 0 is at hangs (targets.py:"),
        (1, "gil", "rank 1 is at hangs (targets.py:"),
        (1, "deaf", "rank 1 wrote no stack"),
        (0, "returns", "rank 0 had returned"),
    ],
)
def test_a_hang_names_the_place_of_every_rank(harness: Harness, rank: int, how: str, place: str) -> None:
    report = run(harness, "hangs", rank=rank, how=how, deadline=2)
    failure = failed(report, "hang", rank)
    assert place in failure.summary
    assert f"rank {1 - rank} waits in all_reduce (distributed_c10d.py:" in failure.summary
    assert report.replies[1 - rank].collective.startswith("all_reduce")
    assert report.replies[rank].status == ("ok" if how == "returns" else "hung")
    assert report.replies[1 - rank].signal == "", "the harness's own SIGKILL is no finding"


def test_a_stopped_rank_is_noted_and_continued_for_its_stack(harness: Harness) -> None:
    report = run(harness, "hangs", rank=1, how="stop", deadline=2)
    failure = failed(report, "hang", 1)
    assert "rank 1 is at hangs (targets.py:" in failure.summary
    assert report.notes == ["rank 1 was in the stopped state (SIGSTOP); continued for its stack"]


def test_others_are_stopped_after_the_grace(harness: Harness) -> None:
    report = run(harness, "fails_beside_a_loop", rank=1)
    failure = failed(report, "exception", 1)
    assert report.replies[0].status == "stopped"
    assert "rank 0 was stopped after the failure; it is at fails_beside_a_loop (targets.py:" in failure.render()
    assert report.seconds < 15


def test_a_second_run_names_mismatched_collectives(harness: Harness) -> None:
    report = run(harness, "mismatched", deadline=3, explain=True)
    failure = failed(report, "hang", 0)
    assert "rank 0 waits in all_reduce" in failure.summary
    assert "rank 1 waits in all_gather" in failure.summary
    assert failure.explanation.startswith("run again with its collectives recorded: collective 1 of default_pg differs")
    assert "rank 0 all_reduce(Float[2]), called in mismatched (targets.py:" in failure.explanation
    assert "rank 1 all_gather(Float[2]), called in mismatched (targets.py:" in failure.explanation
    assert failure.explanation[:100] in failure.render()
    assert list(report.folder.parent.glob("*-1")) == [], "the second run leaves no folder"


@pytest.mark.parametrize("with_pytest", [False, True])
def test_all_ranks_skip(harness: Harness, with_pytest: bool) -> None:
    report = run(harness, "skips", ranks=[0, 1], with_pytest=with_pytest)
    assert report.outcome == "skipped"
    assert report.failure is None
    assert report.skip_reason == "no such thing here"
    report.discard()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lone_skip_is_a_failure(harness: Harness, rank: int) -> None:
    failure = failed(run(harness, "skips", ranks=[rank], deadline=2), "lone_skip", rank)
    assert f"rank {rank} skipped (no such thing here), rank {1 - rank} did not" in failure.summary


def test_no_observation_is_a_failure(harness: Harness) -> None:
    failure = failed(run(harness, "observes", counts=[1, 0]), "no_observation", 1)
    assert "rank 1 of 2 reported success but made no observation" in failure.summary


def test_too_few_observations(harness: Harness) -> None:
    job = Job(target="targets:observes", args={"counts": [3, 2]}, world_size=2, min_observations=3, deadline=20)
    failure = failed(harness.run(job), "no_observation", 1)
    assert "2 of at least 3 observations" in failure.summary


@pytest.mark.parametrize(
    ("what", "text"),
    [("set", "must return JSON data"), ("bytes", "must return JSON data"), ("big", "belong in context.folder")],
)
def test_a_value_that_cannot_travel(harness: Harness, what: str, text: str) -> None:
    report = run(harness, "returns", what=what)
    assert report.failure is not None
    assert text in failed(report, "exception", report.failure.first_rank).summary


def test_nan_travels(harness: Harness) -> None:
    report = run(harness, "returns", what="nan")
    assert math.isnan(report.replies[0].value)
    report.discard()


def test_a_forked_child_cannot_answer_for_its_rank(harness: Harness) -> None:
    report = run(harness, "answers_twice")
    assert [reply.value for reply in report.replies] == ["parent", "parent"]
    assert report.notes == []
    report.discard()


@pytest.mark.parametrize("tag", [{}, {"job": "another", "rank": 0, "attempt": 0}])
def test_forged_replies_are_discarded_and_noted(harness: Harness, tag: dict[str, object]) -> None:
    report = run(harness, "forges", **tag)
    assert [reply.value for reply in report.replies] == ["true", "true"]
    assert any("rank 1 was discarded: it is no JSON" in note for note in report.notes)
    assert any("rank 1 was discarded: it belongs to (job, rank, attempt)" in note for note in report.notes)
    report.discard()


def test_a_rank_that_floods_the_parent(harness: Harness) -> None:
    report = run(harness, "floods", deadline=5)
    assert report.outcome == "failed"
    assert any("sent more than a reply: its channel was closed" in note for note in report.notes)
    assert len(report.notes) < 50
    report.discard()


def test_a_rank_that_closes_its_files(harness: Harness) -> None:
    report = run(harness, "closes_everything")
    assert report.outcome == "failed"
    assert "before it replied" in str(report.failure and report.failure.summary)
    report.discard()


def test_children_of_a_rank_end_with_it(harness: Harness) -> None:
    report = run(harness, "starts_children")
    assert report.outcome == "passed"
    for reply in report.replies:
        end = time.monotonic() + 5
        while Path(f"/proc/{reply.value}/cmdline").exists() and Path(f"/proc/{reply.value}/cmdline").read_bytes():
            assert time.monotonic() < end, "a child of a rank is still there"
            time.sleep(0.02)
    report.discard()
