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
from fsdp_testkit.ranks import Harness, Job, Lease, LeasedSlots, SlotBroker, cores
from fsdp_testkit.ranks.gpus import device_index, visible
from fsdp_testkit.ranks.job import JobReport
from fsdp_testkit.ranks.slots import UNLIMITED, Counter

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from fsdp_testkit.ranks import LeasedSlots
with LeasedSlots({address!r}).lease(2) as lease:
    print("held" + lease.problem, flush=True)
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
        with slots.lease(1) as lease:
            order.append(f"second{lease.problem}")

    thread = threading.Thread(target=second)
    with slots.lease(2) as lease:
        assert lease == Lease()
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
        with LeasedSlots(broker.address, patience=0.2).lease(1) as lease:
            assert lease.problem == "no slots within 0.2 s: this job ran beside others"
        holder.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        with LeasedSlots(broker.address).lease(2) as lease:
            assert lease.problem == ""
        assert time.monotonic() - begun < 5


def test_a_closed_broker_stops_nobody(broker: SlotBroker) -> None:
    said: list[str] = []

    def wait() -> None:
        with LeasedSlots(broker.address).lease(2) as lease:
            said.append(lease.problem)

    thread = threading.Thread(target=wait)
    with LeasedSlots(broker.address).lease(2):
        thread.start()
        time.sleep(0.2)
        broker.close()
        thread.join(10)
    assert said == ["the broker of slots ended: this job ran beside others"]
    with LeasedSlots(broker.address).lease(2) as lease:
        assert lease.problem.startswith("no broker of slots")


def test_two_brokers_do_not_disturb_each_other(broker: SlotBroker) -> None:
    other = SlotBroker(1)
    with LeasedSlots(broker.address).lease(2), LeasedSlots(other.address).lease(1) as lease:
        assert lease == Lease()
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
        def lease(self, processes: int, gpus: int = 0) -> Iterator[Lease]:
            self.leases.append(processes)
            time.sleep(3)
            yield Lease("a note")

    slow = Slow()
    slow.leases = []
    with Harness(preload=(), slots=slow) as harness:
        report = harness.run(Job(target="targets:plain", comm="none", deadline=2.9), explain_hangs=False)
        assert report.notes == ["a note"]
        assert report.outcome == "passed", report.failure and report.failure.render()
    assert slow.leases == [1]


def test_each_job_gets_gpus_of_its_own() -> None:
    counter = Counter(100, ["0", "1", "2"])
    assert counter.ask(1, 2, 2) == [1]
    assert counter.ask(2, 1, 0) == [2], "a job on CPUs waits for no GPU"
    assert counter.ask(3, 1, 1) == [3]
    assert (counter.pinned[1], counter.pinned[2], counter.pinned[3]) == (("0", "1"), (), ("2",))
    assert counter.ask(4, 8, 8) == [], "it needs all of them"
    assert counter.ask(5, 1, 1) == [], "and is not passed by"
    assert counter.leave(1) == []
    assert counter.leave(3) == [4]
    assert counter.pinned[4] == ("0", "1", "2")
    assert counter.leave(4) == [5]


def test_any_order_of_events_gives_a_gpu_to_one_job_at_a_time() -> None:
    for trial in range(100):
        rng = random.Random(trial)
        counter = Counter(rng.randint(1, 4), ["a", "b", "c"][: rng.randint(0, 3)])
        asked = {}
        waiting = set(range(30))
        for who in range(30):
            asked[who] = rng.randint(0, 4)
            waiting -= set(counter.ask(who, rng.randint(1, 4), asked[who]))
            while counter.held and rng.random() < 0.4:
                waiting -= set(counter.leave(rng.choice(sorted(counter.held))))
            pinned = [name for names in counter.pinned.values() for name in names]
            assert len(pinned) == len(set(pinned))
            assert all(len(counter.pinned[who]) == min(asked[who], len(counter.gpus)) for who in counter.held)
        while counter.held:
            waiting -= set(counter.leave(min(counter.held)))
        assert not waiting


def test_a_lease_names_its_gpus() -> None:
    broker = SlotBroker(UNLIMITED, ["GPU-a", "GPU-b"])
    slots = LeasedSlots(broker.address)
    with slots.lease(1, 1) as one, slots.lease(4, 1) as two, slots.lease(50) as three:
        assert (one, two, three) == (Lease(gpus=("GPU-a",)), Lease(gpus=("GPU-b",)), Lease())
        with LeasedSlots(broker.address, patience=0.1).lease(1, 1) as late:
            assert late.gpus == ()
            assert late.problem.startswith("no slots within")
    broker.close()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ("0", "1")),
        ("", ()),
        ("3", ("3",)),
        ("2, 0", ("2", "0")),
        ("0,-1,1", ("0",)),
        ("0,0,1", ("0",)),
        ("GPU-8932f937,MIG-1", ("GPU-8932f937", "MIG-1")),
    ],
)
def test_the_gpus_that_may_be_used(value: str | None, names: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    env = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible(env, tmp_path) == names
    assert visible({}, tmp_path / "none") == ()


def test_a_rank_has_the_gpu_of_its_place() -> None:
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [device_index(rank, 1) for rank in range(2)] == [0, 0]
    with pytest.raises(RuntimeError, match="sees no GPU"):
        device_index(0, 0)


class Pins:
    @contextmanager
    def lease(self, processes: int, gpus: int = 0) -> Iterator[Lease]:
        yield Lease(gpus=("GPU-b", "GPU-c")[:gpus])


@pytest.mark.parametrize("env", [{}, {"CUDA_VISIBLE_DEVICES": "7"}])
def test_ranks_see_the_gpus_of_their_lease(env: dict[str, str]) -> None:
    """A machine without GPUs says so; what it was told to look at is in its environment all the same."""
    seen = []
    with Harness(preload=(), slots=Pins()) as harness:
        harness._attempt = lambda job, *_: seen.append(job.env) or harness_report()  # type: ignore[method-assign]
        for device in ("cuda", "cpu"):
            harness.run(Job(target="targets:plain", comm="none", device=device, world_size=2, env=env))
    assert seen == [{"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-c", **env}, env]


def harness_report() -> JobReport:
    return JobReport(outcome="passed", replies=[], failure=None, notes=[], seconds=0.0, folder=Path("/nowhere"))


def test_a_job_on_gpus_without_one_says_so() -> None:
    with Harness(preload=(), slots=Pins()) as harness:
        report = harness.run(Job(target="targets:plain", comm="none", device="cuda", env={"CUDA_VISIBLE_DEVICES": ""}))
    assert report.failure is not None
    assert "raised RuntimeError: device='cuda' was asked for, and this rank sees no GPU" in report.failure.summary
