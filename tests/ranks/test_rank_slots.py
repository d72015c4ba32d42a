"""Slots: all or none, first come first served, given back by the dead."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.ranks import Harness, Job, LeasedSlots, SlotBroker, cores
from fsdp_testkit.ranks.slots import Counter

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from fsdp_testkit.ranks import LeasedSlots
with LeasedSlots({address!r}).lease(2) as problem:
    print("held" + problem, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def broker() -> Iterator[SlotBroker]:
    made = SlotBroker(2)
    yield made
    made.close()


def test_a_large_job_is_not_passed_by_small_ones() -> None:
    counter = Counter(2)
    assert counter.ask(1, 1) == [1]
    assert counter.ask(2, 2) == []
    assert counter.ask(3, 1) == []
    assert counter.leave(1) == [2]
    assert counter.leave(2) == [3]


def test_a_job_larger_than_the_machine_runs_alone() -> None:
    counter = Counter(2)
    assert counter.ask(1, 4) == [1]
    assert counter.ask(2, 1) == []
    assert counter.leave(1) == [2]


def test_who_leaves_the_queue_is_forgotten() -> None:
    counter = Counter(1)
    counter.ask(1, 1)
    counter.ask(2, 1)
    counter.ask(3, 1)
    assert counter.leave(2) == []
    assert counter.leave(1) == [3]


def test_any_order_of_events_keeps_within_capacity_and_serves_everybody() -> None:
    for trial in range(200):
        rng = random.Random(trial)
        capacity = rng.randint(1, 4)
        counter = Counter(capacity)
        waiting: list[int] = []
        held: set[int] = set()
        for who in range(30):
            waiting.append(who)
            granted = counter.ask(who, rng.randint(1, 6))
            held.update(granted)
            while held and rng.random() < 0.4:
                held.discard(leaver := rng.choice(sorted(held)))
                freed = counter.leave(leaver)
                held.update(freed)
                granted += freed
                assert sum(counter.held.values()) <= capacity
            for name in granted:
                assert name == waiting.pop(0), "somebody was passed by"
        for _ in range(30):
            if held:
                held.discard(leaver := min(held))
                held.update(freed := counter.leave(leaver))
                del waiting[: len(freed)]
        assert not waiting


@pytest.mark.parametrize("capacity", [0, -1, True, 1.5])
def test_a_bad_capacity_is_refused(capacity: object) -> None:
    with pytest.raises(UsageError, match="capacity"):
        Counter(capacity)  # type: ignore[arg-type]


def test_the_default_capacity_is_the_cores() -> None:
    broker = SlotBroker()
    broker.close()
    broker.close()  # twice does no harm
    assert broker.capacity == cores() >= 1


def test_a_lease_waits_for_the_one_before(broker: SlotBroker) -> None:
    slots = LeasedSlots(broker.address)
    order: list[str] = []

    def second() -> None:
        with slots.lease(1) as problem:
            order.append(f"second{problem}")

    thread = threading.Thread(target=second)
    with slots.lease(2) as problem:
        assert problem == ""
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_dead_process_gives_its_slots_back(broker: SlotBroker) -> None:
    code = HOLDER.format(root=str(ROOT), address=broker.address)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with LeasedSlots(broker.address, patience=0.2).lease(1) as problem:
            assert problem == "no slots within 0.2 s: this job ran beside others"
        holder.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        with LeasedSlots(broker.address).lease(2) as problem:
            assert problem == ""
        assert time.monotonic() - begun < 5


def test_a_closed_broker_stops_nobody(broker: SlotBroker) -> None:
    said: list[str] = []

    def wait() -> None:
        with LeasedSlots(broker.address).lease(2) as problem:
            said.append(problem)

    thread = threading.Thread(target=wait)
    with LeasedSlots(broker.address).lease(2):
        thread.start()
        time.sleep(0.2)
        broker.close()
        thread.join(10)
    assert said == ["the broker of slots ended: this job ran beside others"]
    with LeasedSlots(broker.address).lease(2) as problem:
        assert problem.startswith("no broker of slots")


def test_two_brokers_do_not_disturb_each_other(broker: SlotBroker) -> None:
    other = SlotBroker(1)
    with LeasedSlots(broker.address).lease(2), LeasedSlots(other.address).lease(1) as problem:
        assert problem == ""
    other.close()


def test_a_broker_leaves_no_descriptor_and_no_thread() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    broker = SlotBroker(1)
    with LeasedSlots(broker.address).lease(1):
        pass
    broker.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before  # noqa: PTH208


def test_the_deadline_starts_when_the_slots_are_held() -> None:
    class Slow:
        leases: list[int]

        @contextmanager
        def lease(self, processes: int) -> Iterator[str]:
            self.leases.append(processes)
            time.sleep(3)
            yield "a note"

    slow = Slow()
    slow.leases = []
    with Harness(preload=(), slots=slow) as harness:
        report = harness.run(Job(target="targets:plain", comm="none", deadline=2.9), explain_hangs=False)
        assert report.notes == ["a note"]
        assert report.outcome == "passed", report.failure and report.failure.render()
    assert slow.leases == [1]
