"""Jobs of the engine: one alone, or several that fit together in the same ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.together import Request, Together
from fsdp_testkit.ranks import Harness, Job, JobFailure, JobReport

SCENARIOS = "fsdp_testkit.scenarios"
#: Files in which a fault tallies its hits; the name is `fsdp_testkit.scenarios.arming.TALLY` (which imports torch).
TALLY = "fault_hits"
#: Jobs in one batch: what a job leaves in memory stays until the batch ends.
LARGEST_BATCH = 16
#: role -> (place of its group among those of one size, turn within it); what others wait for comes first.
_PLACES = {
    "truth": (0, 0),
    "oracle": (1, 0),
    "backend": (1, 1),
    "plain": (2, 0),
    "claims": (2, 1),
    "lone": (3, 0),
}


@dataclass(slots=True)
class Run:
    """One job's outcome: evidence by name, each a list over ranks; or a failure.

    Attributes:
        evidence: name -> evidence of ranks 0, 1, ...
        failure: one line, ``""`` where the job passed.
        report: the harness's full text.
        first_rank: the rank that failed first.
        notes: what the harness noticed beside.
        hosts: name of each rank's host; empty where all ran on this machine.
        fault_hits: activations of the armed fault.
    """

    evidence: dict[str, list[Evidence]] = field(default_factory=dict)
    failure: str = ""
    report: str = ""
    first_rank: int | None = None
    notes: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    fault_hits: int = 0

    def get(self, name: str = "evidence") -> list[Evidence]:
        """Return the evidence called ``name`` of all ranks."""
        return self.evidence[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A job that is wanted.

    Attributes:
        target: scenario function within `SCENARIOS`, such as ``train:run``.
        args: JSON data.
        layout: its ranks.
        comm: process group that the ranks find.
        name: for reports.
        deadline: seconds.
        role: ``truth``, ``oracle``, ``backend``, ``plain``, ``claims`` or ``lone`` (it breaks its group). Jobs of the
            oracle and of the backend share processes, the oracle's first: nothing that the code under test leaves
            behind reaches those that judge it. So do a plain load and claims. Others are among themselves.
        follows: whether nothing else waits for it, as for a load of what another job has saved. Such a job may run in
            the first ranks of a larger one, in a process group of its own.
    """

    target: str
    args: dict[str, Any]
    layout: Layout
    comm: str
    name: str
    deadline: float
    role: str
    follows: bool = False

    @property
    def key(self) -> str:
        """Equal keys mean the same job."""
        return f"{self.target} {json.dumps(self.args, sort_keys=True)} {self.layout} {self.comm} {self.deadline}"

    @property
    def group(self) -> tuple[int, int, str, str]:
        """Jobs of one group fit together; groups are run in ascending order."""
        return self.layout.world_size, _PLACES[self.role][0], self.comm, self.layout.device

    @property
    def turn(self) -> tuple[int, int]:
        """Jobs that are run in one go are run in ascending order of it: worlds get smaller."""
        return _PLACES[self.role][1], -self.layout.world_size

    def fits_in(self, group: tuple[int, int, str, str]) -> bool:
        """Return whether it may run in the first ranks of a group of jobs."""
        size, *kind = self.group
        return self.follows and self.comm in ("gloo", "nccl") and size <= group[0] and kind == list(group[1:])

    def part(self) -> dict[str, Any]:
        """Return it as a part of ``batch:run``."""
        return {"target": f"{SCENARIOS}.{self.target}", "args": self.args, "ranks": self.layout.world_size}

    def job(self, deadline: float) -> Job:
        """Return it as a job of the harness."""
        return Job(
            target=f"{SCENARIOS}.{self.target}",
            args=self.args,
            world_size=self.layout.world_size,
            device=self.layout.device,
            comm=self.comm,
            # the shard axis of HSDP stays inside a host: it has the traffic of every layer
            together=self.layout.shard if self.layout.kind == "hsdp" else 1,
            deadline=deadline,
            name=self.name,
        )


class Jobs:
    """Runs orders on a harness; procedures inside `together` have theirs put together.

    Jobs that follow others wait until the largest job that is waited for, and run in its first ranks.

    A batch that fails is no verdict: what had ended before is kept, what was under way is run alone and judged
    by that, and the rest goes on in a batch of its own. After a batch that hung there are no more batches.

    Args:
        harness: runs them.
        regroups: whether ranks may leave their process group for a smaller one: the code under test keeps nothing of a
            group beyond a load, and all ranks are on this machine.
    """

    def __init__(self, harness: Harness, *, regroups: bool = False) -> None:
        self.harness = harness
        self.regroups = regroups
        self.together = Together(self._choose, self._run_requests)
        self._batches = True
        self._broken: JobFailure | None = None

    def run(self, order: Order) -> Run:
        """Run an order, now or together with others', and return its outcome."""
        return self.run_all([order])[0]

    def run_all(self, orders: Sequence[Order]) -> list[Run]:
        """Run orders that need nothing of each other and return their outcomes."""
        if self.together.inside:
            return self.together.ask_all([(order.key, order) for order in orders])
        return [self._alone(order) for order in orders]

    def _choose(self, requests: Sequence[Request]) -> list[Request]:
        leading = [request for request in requests if not (self.regroups and request.payload.follows)]
        if leading:
            first = min(request.payload.group for request in leading)
            last = first == max(request.payload.group for request in leading)
        else:
            first, last = max(request.payload.group for request in requests), True
        chosen = [
            request
            for request in requests
            if request.payload.group == first or (self.regroups and last and request.payload.fits_in(first))
        ]
        return sorted(chosen, key=lambda request: tuple(request.payload.turn))[:LARGEST_BATCH]

    def _run_requests(self, requests: list[Request]) -> None:
        left = list(requests)
        while left:
            started = time.monotonic()
            batch = left if self._batches else left[:1]
            done = self._batch(batch) if len(batch) > 1 else 0
            if done < len(batch):  # the next one broke the batch, or is the only one
                run = self._alone(batch[done].payload)
                if len(batch) > 1 and not run.failure:
                    orders: list[Order] = [request.payload for request in batch]
                    regrouped = orders[done].layout.world_size < max(order.layout.world_size for order in orders)
                    before = [order.name for order in orders[:done]]
                    judge_disagreement(run, self._broken, before, regrouped=regrouped)
                batch[done].result = run
                done += 1
            for request in left[:done]:
                request.seconds = (time.monotonic() - started) / done
            left = left[done:]

    def _batch(self, requests: list[Request]) -> int:
        """Run requests in one job; return how many of them, from the first, ended well."""
        orders: list[Order] = [request.payload for request in requests]
        first = orders[0]
        whole = replace(
            first,
            target="batch:run",
            args={"parts": [o.part() for o in orders]},
            # which ranks have to lie on one host is said by the layout with a replicate axis, if there is one
            layout=max((o.layout for o in orders), key=lambda layout: (layout.world_size, layout.kind == "hsdp")),
            name=f"{first.name} and {len(orders) - 1} more",
        )
        # a batch takes longer than one job, and is never the last word on a hang
        report = self.harness.run(whole.job(first.deadline * (1 + (len(orders) - 1) / 4)), explain_hangs=False)
        try:
            self._broken = report.failure
            if report.failure is not None and report.failure.kind == "hang":
                self._batches = False
            for index, request in enumerate(requests):
                run = _finished(report, index, orders[index].layout.world_size)
                if run is None:
                    return index
                request.result = run
            return len(requests)
        finally:
            report.discard()

    def _alone(self, order: Order) -> Run:
        report = self.harness.run(order.job(order.deadline))
        try:
            return to_run(report)
        finally:
            report.discard()


def to_run(report: JobReport) -> Run:
    """Turn a job's report into a run; evidence files stay readable through their mapping."""
    hits = sum(file.stat().st_size for file in Path(report.folder).glob(f"{TALLY}.*"))
    run = Run(notes=list(report.notes), hosts=_hosts(report), fault_hits=hits)
    if report.outcome != "passed":
        failure = report.failure
        run.failure = failure.summary if failure is not None else f"the job was {report.outcome}"
        run.report = failure.render() if failure is not None else ""
        run.first_rank = failure.first_rank if failure is not None else None
        return run
    for reply in sorted(report.replies, key=lambda item: item.rank):
        _add(run, reply.value)
    return run


def judge_disagreement(run: Run, failure: JobFailure | None, before: Sequence[str], *, regrouped: bool = False) -> None:
    """Judge a job that broke a batch and passed alone: a hang may have been slowness, the rest is a failure.

    ``before`` names the jobs that its ranks had run, ``regrouped`` says whether they had left a larger group since.
    """
    others = f"other jobs before it ({', '.join(before)})" if before else "no other job before it"
    left = " and had since left a larger process group" if regrouped else ""
    text = f"failed in ranks that had run {others}{left}, and passed in fresh ones"
    if failure is None or failure.kind == "hang":
        run.notes.append(f"{text}; the first time it did not end in time")
        return
    hint = " (a backend that keeps anything of a process group must not promise 'regroup')" if regrouped else ""
    run.failure = f"{text}{hint}: {failure.summary}"
    run.report = failure.render()
    run.first_rank = failure.first_rank
    run.evidence.clear()


def _finished(report: JobReport, index: int, world_size: int) -> Run | None:
    """Return the run of a batch's part; ``None`` where a rank did not end it."""
    folder = Path(report.folder) / f"part{index}"
    files = [folder / f"reply.{rank}.json" for rank in range(world_size)]
    if not all(file.exists() for file in files):
        return None
    run = Run(notes=list(report.notes), hosts=_hosts(report))
    for file in files:
        _add(run, json.loads(file.read_text(encoding="utf-8")))
    return run


def _hosts(report: JobReport) -> list[str]:
    return [reply.host for reply in report.replies if reply.host]


def _add(run: Run, value: dict[str, str]) -> None:
    for name, path in value.items():
        run.evidence.setdefault(name, []).append(Evidence.read(Path(path)))
