from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdp_testkit.ranks import Harness, Job

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _importable_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    # The parent never imports `targets`: ranks find it because they get the parent's sys.path.
    monkeypatch.syspath_prepend(HERE)
    assert "targets" not in sys.modules


@pytest.fixture(scope="session")
def shared_harness() -> Iterator[Harness]:
    with Harness(preload=("numpy", "torch.distributed"), grace=1.0) as harness:
        # the start of its server, which imports torch, counts in no test
        harness.run(Job(target="fsdp_testkit.ranks.doctor:probe", world_size=2, deadline=120)).discard()
        yield harness


@pytest.fixture
def harness(shared_harness: Harness) -> Iterator[Harness]:
    """A harness that is shared by all tests; each test proves that it left it usable."""
    yield shared_harness
    report = shared_harness.run(Job(target="targets:good", world_size=2, deadline=30))
    assert report.outcome == "passed", report.failure and report.failure.render()
    assert [reply.value["total"] for reply in report.replies] == [[3.0], [3.0]]
    report.discard()
