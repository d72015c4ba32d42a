"""Deadlines on a loaded machine."""

from __future__ import annotations

import time

import pytest

from fsdp_testkit.ranks import Harness, Job, load
from fsdp_testkit.ranks import harness as harness_module


@pytest.mark.parametrize(
    ("seconds", "factor"), [(0.0, 1.0), (load.REFERENCE, 1.0), (2.5 * load.REFERENCE, 2.5), (60.0, 5.0), (None, 5.0)]
)
def test_the_factor_stays_between_one_and_five(seconds: float | None, factor: float) -> None:
    assert load.factor(seconds) == pytest.approx(factor)


def test_a_deadline_is_scaled_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "REFERENCE", 1e-9)  # as if the machine were loaded without measure
    hang = Job(target="targets:hangs", args={"rank": 0, "how": "sleep"}, deadline=0.5)
    with Harness(preload=("torch.distributed",), scale_deadlines=True) as harness:
        begun = time.monotonic()
        report = harness.run(hang, explain_hangs=False)
        assert 2.5 < time.monotonic() - begun < 60
        assert report.failure is not None
        assert "within 2.5 s" in report.failure.summary
        assert "the deadline of 0.5 s was multiplied by 5.0: a trivial job took 0." in report.failure.render()
        assert [path.name for path in harness.folder.iterdir() if path.is_dir()] == [report.folder.name]


def test_the_machine_is_measured_once_for_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    with Harness(preload=(), scale_deadlines=True) as harness:
        for _ in range(3):
            report = harness.run(Job(target="targets:plain", comm="none"))
            assert report.outcome == "passed"
            assert report.replies[0].value["torch"] is False
        first = harness._cost
        assert first is not None
        assert first[1] is not None
        monkeypatch.setattr(load, "VALID", 0.0)
        harness.run(Job(target="targets:plain", comm="none"))
        assert harness._cost != first


def test_a_new_store_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_module, "STORE_JOBS", 2)
    with Harness(preload=("torch.distributed",)) as harness:
        ports = set()
        for _ in range(5):
            assert harness.run(Job(target="targets:good", world_size=2)).outcome == "passed"
            assert harness._store is not None
            ports.add(harness._store.port)
    assert len(ports) == 3
