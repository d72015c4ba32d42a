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
        self.worlds: list[int] = []

    def run(self, job: Job, *, explain_hangs: bool = True) -> JobReport:
        folder = self.folder / f"job{len(self.jobs)}"
        folder.mkdir()
        parts = job.args.get("parts")
        names = [part["args"]["name"] for part in parts] if parts else [job.args["name"]]
        self.jobs.append(names)
        self.worlds.append(job.world_size)
        sizes = [part["ranks"] for part in parts or ()]
        assert sizes == sorted(sizes, reverse=True) or "ddp" in names
        values: list[dict[str, str]] = [{} for _ in range(job.world_size)]
        for index, name in enumerate(names):
            if name.startswith("bad") or (parts and name.startswith("shy")):
                return self.failed(folder, name)
            for rank, value in enumerate(values[: parts[index]["ranks"]] if parts else values):
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


def order(name: str, world: int = 2, role: str = "backend", *, comm: str = "gloo", follows: bool = False) -> Order:
    return Order(
        target="train:run",
        args={"name": name},
        layout=Layout(kind="fsdp", shard=world),
        comm=comm,
        name=name,
        deadline=60.0,
        role=role,
        follows=follows,
    )


def run(ranks: Ranks, *names: str | Order, regroups: bool = False) -> list[Run]:
    jobs = Jobs(cast("Harness", ranks), regroups=regroups)
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


def followers() -> list[Order]:
    return [
        order("on 1", world=1, follows=True),
        order("on 2", follows=True),
        order("on 3", world=3, follows=True),
        order("big", world=4),
        order("ddp", world=4, role="oracle"),
        order("a"),
        order("claims", world=1, role="claims", comm="none"),
        order("plain", world=1, role="plain", comm="none"),
    ]


def test_what_follows_waits_for_the_largest_job_and_runs_in_its_first_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    found = run(ranks, *followers(), regroups=True)
    # plain transformers, which judges, before the claims
    # and what is of the same size as a job that is under way need not wait
    assert ranks.jobs == [["plain", "claims"], ["on 2", "a"], ["ddp", "big", "on 3", "on 1"]]
    assert ranks.worlds == [1, 2, 4]
    assert [len(item.get()) for item in found] == [1, 2, 3, 4, 4, 2, 1, 1]


def test_what_follows_has_ranks_of_its_own_where_groups_cannot_be_left(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    run(ranks, *followers())
    assert ranks.jobs == [["on 1"], ["plain", "claims"], ["on 2", "a"], ["on 3"], ["ddp", "big"]]


def test_what_follows_and_nothing_else_shares_the_largest_of_them(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    run(ranks, *followers()[:3], order("no group", world=1, comm="none", follows=True), regroups=True)
    assert ranks.jobs == [["on 3", "on 2", "on 1"], ["no group"]]


def test_what_broke_among_followers_is_judged_on_its_own_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    found = run(ranks, order("big", world=4), order("bad", world=3, follows=True), *followers()[:2], regroups=True)
    assert ranks.jobs == [["big", "bad", "on 2", "on 1"], ["bad"], ["on 2", "on 1"]]
    assert ranks.worlds == [4, 3, 2]
    assert [bool(item.failure) for item in found] == [False, True, False, False]
    assert [len(item.get()) for item in found if not item.failure] == [4, 1, 2]


@pytest.mark.parametrize("world", [4, 2])
def test_who_fails_after_leaving_a_group_is_told_of_the_capability(tmp_path: Path, world: int) -> None:
    ranks = Ranks(tmp_path)
    _, shy = run(ranks, order("big", world=4), order("shy", world=world, follows=True), regroups=True)
    assert ranks.jobs == [["big", "shy"], ["shy"]]
    left = " and had since left a larger process group" if world == 2 else ""
    assert f"failed in ranks that had run other jobs before it (big){left}, and passed in fresh ones" in shy.failure
    assert ("must not promise 'regroup'" in shy.failure) == (world == 2)


def test_orders_that_need_nothing_of_each_other(tmp_path: Path) -> None:
    for inside in (True, False):
        ranks = Ranks(tmp_path)
        jobs = Jobs(cast("Harness", ranks), regroups=True)
        wanted = [order("a"), order("big", world=4), order("b")]
        found = jobs.together.all([lambda: jobs.run_all(wanted)])[0].value if inside else jobs.run_all(wanted)  # noqa: B023
        assert found is not None
        assert [names(item)[0] for item in found] == ["a", "big", "b"]
        assert ranks.jobs == ([["a", "b"], ["big"]] if inside else [["a"], ["big"], ["b"]])
