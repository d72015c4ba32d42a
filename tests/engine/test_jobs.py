"""Batches of jobs: what is kept of one that fails, and who judges then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.jobs import LARGEST_BATCH, Jobs, Order, Run
from fsdp_testkit.ranks import Job, JobFailure, JobReport, RankReply

if TYPE_CHECKING:
    from fsdp_testkit.ranks import Harness


class Ranks:
    """Stands for the harness.

    Parts called ``bad`` fail, those called ``shy`` only in company; of ``half`` the last rank has no reply then.
    """

    def __init__(self, folder: Path, kind: str = "exception") -> None:
        self.folder = folder
        self.kind = kind
        self.jobs: list[list[str]] = []

    def run(self, job: Job, *, explain_hangs: bool = True) -> JobReport:
        folder = self.folder / f"job{len(self.jobs)}"
        folder.mkdir()
        parts = job.args.get("parts")
        names = [part["args"]["name"] for part in parts] if parts else [job.args["name"]]
        self.jobs.append(names)
        values: list[dict[str, str]] = [{} for _ in range(job.world_size)]
        for index, name in enumerate(names):
            if name.startswith("bad") or (parts and name.startswith("shy")):
                return self.failed(folder, name)
            for rank, value in enumerate(values):
                found = self.evidence(folder, name, rank)
                if not parts:
                    value.update(found)
                    continue
                part = folder / f"part{index}"
                part.mkdir(exist_ok=True)
                if name.startswith("half") and rank == job.world_size - 1:
                    return self.failed(folder, name)
                (part / f"reply.{rank}.json").write_text(json.dumps(found))
        replies = [reply(rank, value) for rank, value in enumerate(values)]
        return JobReport(outcome="passed", replies=replies, failure=None, notes=[], seconds=0.1, folder=folder)

    def failed(self, folder: Path, name: str) -> JobReport:
        failure = JobFailure(kind=self.kind, first_rank=1, summary=f"{name} broke", text="traceback")
        return JobReport(outcome="failed", replies=[], failure=failure, notes=[], seconds=0.1, folder=folder)

    @staticmethod
    def evidence(folder: Path, name: str, rank: int) -> dict[str, str]:
        path = folder / f"{name}.{rank}.bin"
        Evidence(rank=rank, facts={"name": name}).write(path)
        return {"evidence": str(path)}


def reply(rank: int, value: dict[str, str]) -> RankReply:
    return RankReply(rank=rank, status="ok", value=value, observations=1, seconds=0.1)


def order(name: str, world: int = 2, role: str = "backend") -> Order:
    layout = Layout(kind="fsdp", shard=world)
    return Order(
        target="train:run", args={"name": name}, layout=layout, comm="gloo", name=name, deadline=60.0, role=role
    )


def run(ranks: Ranks, *names: str | Order) -> list[Run]:
    jobs = Jobs(cast("Harness", ranks))
    orders = [order(name) if isinstance(name, str) else name for name in names]
    ended = jobs.together.all([lambda o=item: jobs.run(o) for item in orders])
    assert all(end.error is None for end in ended), [end.error for end in ended]
    return [cast("Run", end.value) for end in ended]


def names(found: Run) -> list[str]:
    return [evidence.facts["name"] for evidence in found.get()]


def test_jobs_of_one_kind_share_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    found = run(ranks, "a", order("big", world=4), "b", order("ddp", role="oracle"), "c")
    # what judges comes before what is judged
    assert ranks.jobs == [["ddp", "a", "b", "c"], ["big"]]
    assert [names(item) for item in found] == [["a"] * 2, ["big"] * 4, ["b"] * 2, ["ddp"] * 2, ["c"] * 2]
    assert not list(tmp_path.iterdir())


def test_roles_that_share_no_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    run(ranks, order("lone", role="lone"), order("claims", role="claims"), "a", order("truth", role="truth"), "b")
    assert ranks.jobs == [["truth"], ["a", "b"], ["claims"], ["lone"]]


def test_what_is_asked_for_beside_shares_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    jobs = Jobs(cast("Harness", ranks))

    def procedure() -> str:
        jobs.together.beside(lambda: jobs.run(order("bad ddp", role="oracle")))
        jobs.together.beside(lambda: jobs.run(order("ddp", role="oracle")))
        mine = jobs.run(order("a"))
        return mine.failure

    (ended,) = jobs.together.all([procedure])
    assert ended.value == ""
    assert ended.error is None
    assert ranks.jobs == [["bad ddp", "ddp", "a"], ["bad ddp"], ["ddp", "a"]]


@pytest.mark.parametrize("broken", ["bad", "half"])
def test_what_broke_a_batch_is_judged_alone_and_the_rest_goes_on(tmp_path: Path, broken: str) -> None:
    ranks = Ranks(tmp_path)
    found = run(ranks, "a", broken, "c", "d")
    assert ranks.jobs == [["a", broken, "c", "d"], [broken], ["c", "d"]]
    assert [bool(item.failure) for item in found] == [False, True, False, False]
    assert names(found[3]) == ["d", "d"]


def test_what_fails_in_company_alone_is_a_failure_that_says_so(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    found = run(ranks, "a", "shy", "c")
    assert ranks.jobs == [["a", "shy", "c"], ["shy"], ["c"]]
    assert "failed in ranks that had run other jobs before it (a), and passed in fresh ones" in found[1].failure
    assert "shy broke" in found[1].failure
    assert not found[1].evidence


def test_after_a_hang_nothing_is_put_together(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, kind="hang")
    found = run(ranks, "a", "shy", "c", "d")
    assert ranks.jobs == [["a", "shy", "c", "d"], ["shy"], ["c"], ["d"]]
    # it may only have been slow
    assert not found[1].failure
    assert "did not end in time" in found[1].notes[0]


def test_a_batch_has_a_largest_size(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    run(ranks, *[f"job{index}" for index in range(LARGEST_BATCH + 2)])
    assert [len(job) for job in ranks.jobs] == [LARGEST_BATCH, 2]
