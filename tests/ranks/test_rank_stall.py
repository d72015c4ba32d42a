"""A job that cannot go on is ended early; one that is merely slow is not. See also `faults.FAULTS`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fsdp_testkit.ranks import Harness, Job
from fsdp_testkit.ranks.stillness import Stillness, sleeps

SLEEP = "import time; print(1, flush=True); time.sleep(1000)"
LOOP = "print(1, flush=True)\nwhile True: pass"
THREAD = (
    "import threading, time; threading.Thread(target=exec, args=('while True: pass',), daemon=True).start(); " + SLEEP
)


@contextmanager
def process(code: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.2)
        try:
            yield child.pid
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("code", "still", "asleep"), [(SLEEP, True, True), (LOOP, False, False), (THREAD, False, False)]
)
def test_only_who_does_nothing_stands_still(code: str, still: bool, asleep: bool) -> None:
    with process(code) as pid:
        look = Stillness(0.0)
        look.look(pid, 1.0)  # what its start has cost
        # a loaded machine may give a busy process little time
        for now in range(2, 100):
            time.sleep(0.05)
            look.look(pid, float(now))
            if not still and look.since > 1.0:
                break
        assert (look.since <= 1.0) is still
        assert sleeps(pid) is asleep


def test_who_is_stopped_or_gone_does_not_stand_still() -> None:
    with process(SLEEP) as pid:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.2)
        look = Stillness(0.0)
        look.look(pid, 5.0)
        assert look.since == 5.0, "somebody may be debugging it"
        assert not sleeps(pid)
    look.look(pid, 6.0)
    assert look.since == 6.0
    assert not sleeps(pid)


@pytest.mark.parametrize("how", ["sleeps", "computes"])
def test_a_rank_that_comes_late_is_waited_for(harness: Harness, how: str) -> None:
    args = {"rank": 1, "how": how, "seconds": 2.5}
    report = harness.run(Job(target="fault_targets:comes_late", args=args, world_size=2, stall=0.5))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert [reply.value for reply in report.replies] == ["all came"] * 2
    assert report.notes == []
    report.discard()


@pytest.mark.parametrize(("stall", "outcome"), [(30.0, "passed"), (0.5, "failed")])
def test_a_test_of_timeouts_asks_for_patience(harness: Harness, stall: float, outcome: str) -> None:
    job = Job(target="fault_targets:times_out", args={"rank": 1}, world_size=2, stall=stall)
    report = harness.run(job, explain_hangs=False)
    assert report.outcome == outcome
    assert (report.failure is None) or report.failure.kind == "hang"
    report.discard()
