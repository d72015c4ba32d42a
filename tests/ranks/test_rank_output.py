"""What a rank prints: little is kept whole, much is cut in the middle, and a full disk costs nobody a report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fsdp_testkit.ranks import Harness, Job, output
from fsdp_testkit.ranks.output import Output


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HEAD", 100)
    monkeypatch.setattr(output, "TAIL", 100)


def printed(path: Path, *parts: bytes) -> Output:
    made = Output(path)
    for part in parts:
        os.write(made.inlet, part)
        assert made.drain()
    made.close_inlet()
    assert not made.drain()
    made.finish()
    assert made.outlet == -1
    return made


@pytest.mark.parametrize("sizes", [[], [0], [1], [99], [100], [60, 60], [100, 100], [200], [30] * 6])
def test_what_fits_is_kept_whole(tmp_path: Path, sizes: list[int]) -> None:
    parts = [bytes([65 + index]) * size for index, size in enumerate(sizes) if size]
    made = printed(tmp_path / "log", *parts)
    kept = (tmp_path / "log").read_bytes() if parts else b""
    assert kept == b"".join(parts)
    assert made.problem == ""
    assert made.tail(10_000) == kept.decode()


@pytest.mark.parametrize("sizes", [[201], [100, 101], [1, 5000], [7] * 200])
def test_the_middle_of_more_is_cut_and_counted(tmp_path: Path, sizes: list[int]) -> None:
    parts = [bytes([65 + index % 26]) * size for index, size in enumerate(sizes)]
    whole = b"".join(parts)
    made = printed(tmp_path / "log", *parts)
    note = b"\n[%d bytes were cut here]\n" % (len(whole) - 200)
    assert (tmp_path / "log").read_bytes() == whole[:100] + note + whole[-100:]
    assert made.problem == f"printed {len(whole)} bytes: its log has the first and the last 100"
    assert made.tail(50) == "..." + whole[-50:].decode()


def test_what_a_dead_writer_left_is_read_at_the_end(tmp_path: Path) -> None:
    made = Output(tmp_path / "log")
    os.write(made.inlet, b"last words")
    made.finish()
    assert (tmp_path / "log").read_bytes() == b"last words"


def test_a_full_disk_is_told_and_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    made = printed(tmp_path / "log", b"hello")
    assert made.problem == "has an incomplete log: No space left on device"
    assert made.tail(100) == "hello"


def test_a_rank_that_prints_without_end(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real limits
    report = harness.run(Job(target="fault_targets:prints", args={"rank": 1, "mebibytes": 100}, world_size=2))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert report.notes == ["rank 1 printed 104857610 bytes: its log has the first and the last 1048576"]
    log = report.folder / "logs" / "rank1.log"
    assert log.stat().st_size < (2 << 20) + 100
    assert log.read_bytes().startswith(b"begin\nxxx")
    assert log.read_bytes().endswith(b"xxx\nend\n")
    assert len(report.replies[1].stderr) < 10_000
    report.discard()
