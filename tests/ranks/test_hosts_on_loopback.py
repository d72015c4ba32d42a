"""Two agents on loopback stand for two hosts: the same jobs, the same reports, and each rank has its host's name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import SECRET, AgentProcess, secret_file

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks import Harness, Hosts, Job, JobReport
from fsdp_testkit.ranks.folders import hold
from fsdp_testkit.ranks.wire import Wire, ask


def children(pid: int) -> set[int]:
    """Return the processes that a process has started, and theirs."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, AgentProcess]]:
    folder = tmp_path_factory.mktemp("agents")
    env = {**os.environ, "FROM_HOST": "yes"}
    env.pop("FROM_TEST", None)
    made = {name: AgentProcess(folder, name, "127.0.0.1:0", env=env) for name in "ab"}
    yield made
    for agent in made.values():
        assert agent.stop() == 0, agent.log.read_text()


@pytest.fixture(scope="module")
def hosts(agents: dict[str, AgentProcess]) -> Hosts:
    return Hosts([agent.address for agent in agents.values()], SECRET.encode())


@pytest.fixture(scope="module")
def shared(hosts: Hosts) -> Iterator[Harness]:
    with Harness(preload=("numpy", "torch.distributed"), grace=1.0, hosts=hosts) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """The harness over both hosts; each test proves that it left it usable."""
    yield shared
    report = shared.run(Job(target="targets:good", world_size=4, deadline=30))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert [reply.host for reply in report.replies] == ["a", "a", "b", "b"]
    assert [reply.value["total"] for reply in report.replies] == [[10.0]] * 4
    report.discard()


def failed(report: JobReport) -> str:
    assert report.outcome == "failed"
    assert report.failure is not None
    text = report.failure.render()
    report.discard()
    return text


def test_ranks_of_two_hosts_are_one_group(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_PARENT", "set by the test")
    job = Job(target="targets:describe", world_size=3, env={"FROM_JOB": "x"}, deadline=30)
    report = harness.run(job)
    assert report.outcome == "passed", report.failure and report.failure.render()
    values = [reply.value for reply in report.replies]
    assert [value["env"]["RANK"] for value in values] == ["0", "1", "2"]
    assert [value["env"]["LOCAL_RANK"] for value in values] == ["0", "1", "0"]
    assert {value["env"]["WORLD_SIZE"] for value in values} == {"3"}
    assert {value["env"]["FROM_JOB"] for value in values} == {"x"}
    assert {value["env"]["FROM_PARENT"] for value in values} == {"set by the test"}
    assert all(25 < value["left"] < 30 for value in values), "deadlines are on each host's own clock"
    report.discard()


def test_an_exception_is_reported_with_its_host(harness: Harness) -> None:
    # after a collective: a rank that is still being connected may wait for the others instead of hearing of rank 2
    job = Job(target="targets:raises", args={"rank": 2, "when": "after"}, world_size=4, deadline=30)
    text = failed(harness.run(job))
    assert "rank 2 (host b) of 4 raised ValueError: boom" in text
    assert "in raises" in text
    assert "3 (host b) raised RuntimeError" in text, "a consequence, of which the host is named as well"


def test_a_killed_rank_ends_its_job_and_nothing_else(harness: Harness, agents: dict[str, AgentProcess]) -> None:
    job = Job(target="targets:ends", args={"rank": 3, "how": "SIGKILL"}, world_size=4, deadline=30)
    harness.run(Job(target="targets:good", world_size=4)).discard()
    before = children(agents["b"].process.pid)
    text = failed(harness.run(job))
    assert "rank 3 (host b) of 4 was ended by SIGKILL before it replied" in text
    assert "last words" in text, "what a rank printed travels"
    assert eventually(lambda: children(agents["b"].process.pid) == before), "the agent and its rank server go on"


def test_a_hang_is_reported_with_the_stack_of_every_rank(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise EnvironmentLacksError("host b cannot be reached")

    # what is known of the first run must not be lost with the second
    monkeypatch.setattr(harness, "_explain", unreachable)
    begun = time.monotonic()
    job = Job(target="targets:hangs", args={"rank": 3, "how": "stop"}, world_size=4, deadline=2)
    report = harness.run(job)
    seconds = time.monotonic() - begun
    assert any("rank 3 was in the stopped state" in note and "host b" in note for note in report.notes)
    assert all(reply.stack for reply in report.replies)
    text = failed(report)
    assert "no reply from ranks 0-1 (host a), 2-3 (host b) of 4 within 2 s: rank 3 (host b) is at hangs" in text
    assert "rank 0 (host a) waits in all_reduce" in text
    assert "it could not be run again: host b cannot be reached" in text
    assert seconds < 30, "far more than a loaded machine adds to the deadline"


def test_a_mismatch_of_collectives_is_explained_by_the_second_run(harness: Harness) -> None:
    report = harness.run(Job(target="targets:mismatched", world_size=2, deadline=2))
    assert report.failure is not None
    assert "all_gather" in report.failure.explanation.lower().replace("allgather", "all_gather")
    report.discard()


def test_too_many_ranks_are_refused_before_anything_is_started(harness: Harness) -> None:
    with pytest.raises(UsageError, match="5 ranks do not fit: a has 2, b has 2"):
        harness.run(Job(target="targets:good", world_size=5))


def test_a_wrong_secret_is_refused(hosts: Hosts) -> None:
    with (
        Harness(hosts=Hosts(hosts.addresses, b"x" * 20)) as harness,
        pytest.raises(UsageError, match="refused this pytest: wrong secret"),
    ):
        harness.run(Job(target="targets:good"))


def test_who_ends_leaves_nothing_on_the_hosts(hosts: Hosts, agents: dict[str, AgentProcess]) -> None:
    before = {name: children(agent.process.pid) for name, agent in agents.items()}
    with Harness(preload=(), hosts=hosts) as harness:
        report = harness.run(Job(target="targets:plain", comm="none"))
        assert report.outcome == "passed"
        report.discard()
        assert all(children(agent.process.pid) - before[name] for name, agent in agents.items())
        folder = harness.folder
    for name, agent in agents.items():
        assert eventually(lambda name=name, agent=agent: children(agent.process.pid) <= before[name])  # type: ignore[misc]
    assert not folder.exists()


def test_a_parent_that_is_killed_leaves_nothing_on_the_hosts(
    hosts: Hosts, agents: dict[str, AgentProcess], tmp_path: Path
) -> None:
    before = {name: children(agent.process.pid) for name, agent in agents.items()}
    script = f"""
from fsdp_testkit.ranks import Harness, Hosts, Job
harness = Harness(preload=(), hosts=Hosts({list(hosts.addresses)!r}, {SECRET.encode()!r}))
harness.run(Job(target="targets:waits", args={{"folder": {str(tmp_path)!r}}}, comm="none"))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env)
    try:
        assert eventually((tmp_path / "pid0").exists, 30)
    finally:
        parent.kill()
        parent.wait()
    rank = int((tmp_path / "pid0").read_text())
    assert eventually(lambda: not Path(f"/proc/{rank}").exists()), "also one that is stuck in C code"
    for name, agent in agents.items():
        assert eventually(lambda name=name, agent=agent: children(agent.process.pid) <= before[name])  # type: ignore[misc]


def test_a_silent_connection_holds_nobody_up(harness: Harness, hosts: Hosts) -> None:
    with socket.create_connection(hosts.agents[0][0]) as silent:
        report = harness.run(Job(target="targets:good", world_size=2, deadline=30))
        assert report.outcome == "passed"
        report.discard()
        silent.sendall(b"\0\0\0\x02\0\0\0\0{}")
        link = Wire(socket.create_connection(hosts.agents[0][0]))
        ask(link, SECRET.encode(), "a")
        link.close()


def test_an_agent_that_ends_is_named_and_its_return_is_noticed(tmp_path: Path) -> None:
    started = [AgentProcess(tmp_path, name, "127.0.0.1:0", 1, env=dict(os.environ)) for name in "cd"]
    address = started[1].address
    try:
        hosts = Hosts([agent.address for agent in started], SECRET.encode())
        with Harness(preload=(), grace=0.5, hosts=hosts) as harness:
            good = Job(target="targets:plain", comm="none", deadline=30)
            assert harness.run(good).outcome == "passed"
            served = children(started[1].process.pid)
            started[1].process.send_signal(signal.SIGKILL)
            started[1].process.wait()
            assert served
            assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in served))
            with pytest.raises(EnvironmentLacksError, match=rf"host d \({address}\) cannot be reached"):
                harness.run(good)
            started[1] = AgentProcess(tmp_path, "d", address, 1, env=dict(os.environ))
            assert harness.run(good).outcome == "passed"
    finally:
        for agent in started:
            agent.stop()


def test_a_session_that_is_lost_between_jobs_is_replaced_with_its_store(
    harness: Harness, agents: dict[str, AgentProcess]
) -> None:
    harness.run(Job(target="targets:good", world_size=4)).discard()
    agent = agents["a"].process.pid
    sessions = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    assert sessions
    for pid in sessions:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in sessions))
    report = harness.run(Job(target="targets:good", world_size=4, deadline=30))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert any("host a" in note and "was connected anew: the other side closed" in note for note in report.notes)
    report.discard()


def test_a_rank_that_is_told_to_have_ended_is_not_heard_again(tmp_path: Path) -> None:
    program = [str(Path(__file__).with_name("server_first.py"))]
    agent = AgentProcess(tmp_path, "e", "127.0.0.1:0", program=program, env=dict(os.environ))
    try:
        with Harness(preload=(), hosts=Hosts([agent.address], SECRET.encode())) as harness:
            report = harness.run(Job(target="targets:plain", world_size=2, comm="none", deadline=30))
            assert report.outcome == "passed", report.failure and report.failure.render()
            report.discard()
    finally:
        assert agent.stop() == 0, agent.log.read_text()
    log = agent.log.read_text()
    assert "turned round" in log
    assert "Traceback" not in log, log


def test_the_secret_file_of_tests_is_private(tmp_path: Path) -> None:
    assert secret_file(tmp_path).stat().st_mode & 0o077 == 0


def test_sessions_own_their_folders(harness: Harness) -> None:
    # a harness that starts beside them deletes what nobody owns
    harness.run(Job(target="targets:good", world_size=4)).discard()
    folders = list(Path(tempfile.gettempdir()).glob("fsdp_testkit-host-*"))
    assert len(folders) >= 2
    assert [hold(folder) for folder in folders] == [-1] * len(folders)
