"""Folders: they belong to a process, go with it, and have to have room."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.ranks import Harness, Job
from fsdp_testkit.ranks.folders import PREFIX, YOUNG, OwnFolder, remove_orphans

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: A parent that is killed together with its rank server: nobody is left to tidy up.
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {here!r}]
from fsdp_testkit.ranks import Harness, Job
harness = Harness(preload=())
assert harness.run(Job(target="targets:plain", comm="none")).outcome == "passed"
os.kill(harness._links["fork"].process.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""
#: Runs jobs where the folder for temporary files is a small disk of its own.
SMALL_DISK = """
import sys, tempfile
sys.path[:0] = [{root!r}, {here!r}]
import fault_targets
try:
    fault_targets.small_mount({folder!r}, {options!r})
except OSError as error:
    print("lacks", error)
    raise SystemExit(0)
tempfile.tempdir = {folder!r}
from fsdp_testkit.ranks import Harness, Job
with Harness(preload=("torch.distributed",)) as harness:
    for target in ({target!r}, "targets:good"):
        try:
            report = harness.run(Job(target=target, args={{"rank": 1}} if "fault" in target else {{}}, world_size=2))
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print(report.outcome, report.failure and report.failure.summary)
            report.discard()
"""


def age(folder: Path) -> None:
    then = time.time() - YOUNG - 1
    os.utime(folder, (then, then))


def test_only_what_nobody_owns_is_removed(tmp_path: Path) -> None:
    owned = OwnFolder(tmp_path)
    orphan, young, other, target = (tmp_path / name for name in (f"{PREFIX}1", f"{PREFIX}2", "mine", "target"))
    for folder in (orphan, young, other, target):
        folder.mkdir()
        (folder / "file").write_text("x")
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").write_text("x")
    for folder in (owned.path, orphan, other, target):
        age(folder)
    assert remove_orphans(tmp_path) == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {owned.path.name, young.name, "mine", "target", f"{PREFIX}link", f"{PREFIX}file"}
    assert (target / "file").exists()
    owned.release()
    assert remove_orphans(tmp_path) == 1
    assert not owned.path.exists()
    assert remove_orphans(tmp_path / "none") == 0


def test_what_a_killed_session_left_goes_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = KILLED.format(root=str(ROOT), here=str(HERE))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(f"{PREFIX}*")
    age(left)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Harness(preload=()) as harness:
        assert [path.name for path in tmp_path.iterdir()] == [harness.folder.name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        # the disk's own folder, the harness's and the log of its server: none is left for a job
        ("nr_inodes=3", "targets:good", ["EnvironmentLacksError jobs cannot have their files in"] * 2),
        ("size=1m", "fault_targets:fills_folder", ["failed fault_targets:fills_folder: rank 1 of 2 raised", "passed"]),
    ],
)
def test_a_small_disk(tmp_path: Path, options: str, target: str, said: list[str]) -> None:
    code = SMALL_DISK.format(root=str(ROOT), here=str(HERE), folder=str(tmp_path), options=options, target=target)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    if lines and lines[0].startswith("lacks"):
        pytest.skip(lines[0])
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(start)
    assert "No space left on device" in lines[0]


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: _fail(errno.EROFS))
    with pytest.raises(
        EnvironmentLacksError, match=r"their files in .*: Read-only file system; set TMPDIR to a folder"
    ):
        Harness(tmp_path)


def test_too_few_files_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with Harness(preload=()) as harness:
        job = Job(target="targets:plain", comm="none")
        harness.run(job).discard()
        with monkeypatch.context() as patch:
            patch.setattr("os.memfd_create", lambda _: _fail(errno.EMFILE))
            with pytest.raises(EnvironmentLacksError, match="Too many open files; raise the limit of open files"):
                harness.run(job)
        report = harness.run(job)
        assert report.outcome == "passed"
        assert [path.name for path in harness.folder.iterdir() if path.is_dir()] == [report.folder.name]


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
