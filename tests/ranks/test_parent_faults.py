"""The parent is struck in the middle of a job: nothing is left within five seconds, and other tests go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: Seconds for everything to be gone, and what a loaded machine gets on top.
GONE, PATIENCE = 5.0, 55.0
TESTS = """
import os, signal, sys, time
import pytest

sys.path.insert(0, {here!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

@pytest.fixture
def parent():
    return os.getpid()

@pytest.mark.ranks(2)
def test_before(rank, world_size):
    assert world_size == 2

@pytest.mark.ranks(2)
def test_struck(rank_context, parent):
    import fault_targets
    fault_targets.kills_parent(rank_context, parent, {number}, {folder!r})

@pytest.mark.ranks(2)
def test_after(rank, world_size):
    assert world_size == 2
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def seconds_until(holds: Callable[[], bool], what: str) -> float:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < GONE + PATIENCE, what
        time.sleep(0.02)
    return time.monotonic() - begun


def session(folder: Path, tests: str, temporary: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start pytest on ``tests`` in a folder of its own."""
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments, str(folder / "test_it.py")],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, number: int, *arguments: str, others: int = 0) -> tuple[str, int, float]:
    """Run a session of three tests whose second one sends ``number`` to its parent; what is left is waited for.

    ``others`` is how many harnesses use the same place for temporary files.
    """
    temporary, seen = folder / "tmp", folder / "seen"
    temporary.mkdir(exist_ok=True)
    seen.mkdir()
    tests = TESTS.format(here=str(HERE), number=int(number), folder=str(seen))
    with session(folder, tests, temporary, *arguments) as it:
        output, _ = it.communicate(timeout=120)
    pids = [int(path.read_text()) for path in seen.iterdir()]
    assert len(pids) == 2, output
    waited = seconds_until(lambda: all(map(gone, pids)), "a rank outlived its parent")
    waited += seconds_until(
        lambda: len(list(temporary.glob("fsdp_testkit-*"))) <= others, "a folder outlived its parent"
    )
    return output, it.returncode, waited


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_session_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    output, status, _ = run(tmp_path, number)
    assert "test_before PASSED" in output
    assert status == (pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -number)


def test_a_worker_that_dies_in_a_job_costs_one_test(tmp_path: Path) -> None:
    output, status, _ = run(tmp_path, signal.SIGKILL, "-n", "1")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "crashed while running 'test_it.py::test_struck'" in output
    assert "1 failed, 2 passed" in output


BESIDE = """
import time
from pathlib import Path
import pytest

@pytest.mark.ranks(2)
def test_before_and_after(rank):
    import torch
    import torch.distributed as dist
    Path({folder!r}, f"begun{{rank}}").touch()
    while not Path({folder!r}, "struck").exists():
        time.sleep(0.05)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2

@pytest.mark.ranks(2)
def test_after(rank, world_size):
    assert world_size == 2
"""


def test_a_session_that_is_killed_does_not_disturb_the_one_beside_it(tmp_path: Path) -> None:
    one, other, temporary = tmp_path / "one", tmp_path / "other", tmp_path / "one" / "tmp"
    for folder in (one, other, temporary):
        folder.mkdir()
    with session(other, BESIDE.format(folder=str(other)), temporary) as beside:
        seconds_until((other / "begun1").exists, "the other session did not start")
        run(one, signal.SIGKILL, others=1)
        (other / "struck").touch()
        output, _ = beside.communicate(timeout=120)
    assert "2 passed" in output
    assert not list(temporary.glob("fsdp_testkit-*"))
