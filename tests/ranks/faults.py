"""The fault table: what can happen to a rank, and what the user has to see then."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_testkit.ranks import Harness, Job

#: Deadline of jobs that hang; a report is due at most 5 s after it.
DEADLINE = 2.0
LATE = 5.0
#: Seconds by which a failure that is no hang has to be reported: more than the grace, far less than the deadline.
PROMPT = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row.

    Attributes:
        title: what happens.
        target: the function that does it on rank ``rank``.
        says: pattern of the summary; ``{rank}`` is the struck rank.
        kind: of `JobFailure`; several where the machine decides; ``""`` for a job that passes with a note, ``skip``
            for one that is skipped.
        args: further arguments.
        by_rank: whether the rank that is struck is known, and has to be named first.
        everywhere: whether it is also to strike all ranks at once.
        stall: of `Job`; such a job has a deadline that it must not need.
    """

    title: str
    target: str
    says: str
    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    by_rank: bool = True
    everywhere: bool = False
    stall: float = 0.0

    @property
    def limit(self) -> str:
        """What ends a job that hangs, in words; ``""`` for any other."""
        if self.stall:
            return f"stood still for {self.stall:g}"
        return f"deadline {DEADLINE:g}" if "hang" in self.kind.split("|") else ""

    def places(self, *sizes: int) -> list[tuple[int, int]]:
        """Return (world size, struck rank) for each way to strike: the first rank, the last one, all of them."""
        ranks = [(size, rank) for size in sizes for rank in (0, size - 1)]
        return ranks + [(size, -1) for size in sizes if self.everywhere]


def _raises(title: str, says: str, **args: Any) -> Fault:
    everywhere = args.get("when", "before") != "inside"
    return Fault(title=title, target="targets:raises", says=says, kind="exception", args=args, everywhere=everywhere)


def _ends(title: str, how: int | str, says: str) -> Fault:
    kind = "exit" if isinstance(how, int) else "signal"
    return Fault(title=title, target="targets:ends", says=says, kind=kind, args={"how": how}, everywhere=True)


def _hangs(title: str, how: str, says: str) -> Fault:
    return Fault(
        title=title, target="targets:hangs", says=says, kind="hang", args={"how": how}, everywhere=how != "returns"
    )


def _own(title: str, name: str, kind: str, says: str, args: dict[str, Any] | None = None, **more: Any) -> Fault:
    return Fault(title=title, target=f"fault_targets:{name}", says=says, kind=kind, args=args or {}, **more)


FAULTS = (
    _raises("exception before a collective", "rank {rank} of .* raised ValueError: boom", when="before"),
    _raises("exception in a collective", "rank {rank} of .* raised", when="inside"),
    _raises("exception after a collective", "rank {rank} of .* raised ValueError: boom", when="after"),
    _own("different exceptions on all ranks", "different", "exception", "raised ValueError: first, on rank {rank}"),
    _raises("exception that cannot be pickled", "rank {rank} of .* raised UnpicklableError", kind="unpicklable"),
    _raises("exception whose `__str__` raises", "raised SilentError: <its __str__ raised", kind="silent"),
    _raises("`SystemExit`", "rank {rank} of .* raised SystemExit", kind="exit"),
    _raises("`KeyboardInterrupt` in a rank", "rank {rank} of .* raised KeyboardInterrupt", kind="interrupt"),
    _ends("`os._exit(0)`", 0, "rank {rank} of .* exited with status 0 before it replied"),
    _ends("`os._exit(3)`", 3, "rank {rank} of .* exited with status 3 before it replied"),
    _ends("SIGSEGV", "SIGSEGV", "rank {rank} of .* was ended by SIGSEGV"),
    _ends("SIGKILL", "SIGKILL", r"rank {rank} of .* was ended by SIGKILL .*\(out of memory\?\)"),
    _ends("SIGABRT from gloo", "terminate", "rank {rank} of .* was ended by SIGABRT .*terminate called"),
    _own("memory limit", "memory", "exception", "rank {rank} of .* raised .*(emory|alloc)"),
    _hangs("one rank sleeps", "sleep", "rank {rank} is at hangs"),
    _hangs("endless Python loop", "loop", "rank {rank} is at hangs"),
    _hangs("stuck in C code with the GIL", "gil", "rank {rank} is at hangs"),
    _hangs("stopped with SIGSTOP", "stop", "rank {rank} is at hangs"),
    _hangs("one rank returns before a collective", "returns", "rank {rank} had returned"),
    _own("deadlock in a user's thread", "thread_deadlock", "hang", "rank {rank} is at thread_deadlock"),
    _own("collectives in another order", "order", "hang|signal|exception", "all_gather|SIGABRT|raised", by_rank=False),
    _own("different shapes", "shapes", "signal|exception|hang", "data size|raised|SIGABRT|waits in", by_rank=False),
    _own(
        "one rank returns before a collective, with a deadline of a minute",
        "returns_early",
        "hang",
        r"cannot go on, and stood still for \d s: .* waits? in all_reduce.*; rank {rank} had returned",
        stall=1.0,
    ),
    _own(
        "two groups in another order, with a deadline of a minute",
        "groups",
        "hang",
        "ranks 0-. of . cannot go on, and stood still",
        by_rank=False,
        stall=1.0,
    ),
    _own("one rank skips", "skip", "lone_skip", r"rank {rank} skipped \(no such thing here\), rank.* did not"),
    _own("all ranks skip", "skip", "skip", "no such thing here", {"rank": -1}, by_rank=False),
    _own(
        "the reply is lost, and the rank ends",
        "reply_lost",
        "exit",
        "rank {rank} of .* exited with status 70 .*Broken pipe",
    ),
    _own("the reply cannot come, and the rank lives", "deaf", "lost", "rank {rank} of .* was lost: closed its channel"),
    _own("the reply comes twice", "reply_doubled", "", "rank {rank} replied more than once: its first reply counts"),
    _own("the reply comes late", "reply_late", "hang", "no reply from rank {rank}.* replied 'ok' too late"),
    _own(
        "a reply of an earlier job",
        "reply_of_earlier_job",
        "",
        r"rank {rank} was discarded: it belongs to \(job, rank, attempt\)",
    ),
    _own(
        "65 MiB on the channel of replies",
        "flood",
        "exit|exception",
        "rank {rank} of .*: sent more than a reply, so that its channel was closed",
    ),
    _own("prints 64 MiB", "prints", "", "rank {rank} printed 67.* bytes: its log has the first", {"mebibytes": 64}),
    _own("full /dev/shm", "shared_memory", "signal|exception", "rank {rank} of .*(SIGBUS|No space left|shared memory)"),
    _own("reply of 65 MiB", "huge_reply", "exception", "rank {rank} of .* belong in context.folder"),
    _own("the store's connection drops", "store_dropped", "exception", "rank {rank} of .* raised Dist"),
    _own("full temporary folder", "full_folder", "exception", "rank {rank} of .* raised OSError.*No space left"),
    _own("full disk under the log", "full_log", "exception", "rank {rank} of .* raised OSError.*No space left"),
    _own(
        "a job changes global state (see below) and fails",
        "pollutes",
        "exception",
        "rank {rank} of .* raised RuntimeError: polluted",
        {"fails": True},
    ),
    _own("a job changes global state (see below) and passes", "pollutes", "", "", {"fails": False}),
    Fault(
        title="abort at exit after success",
        target="targets:aborts_after_success",
        says="rank {rank} was ended by signal 6 at exit, after it had reported its result",
        kind="",
        everywhere=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one fault; ``lacks`` says why it could not be brought about here."""

    problem: str
    said: str
    seconds: float
    next_seconds: float
    lacks: str = ""


def strike(harness: Harness, fault: Fault, world_size: int, rank: int, patience: float = 1.0) -> Seen:
    """Run a fault on one rank and a good job after it; say in what it differs from the table, ``""`` if in nothing.

    ``patience`` multiplies what is allowed beyond the deadline, for a machine that others use as well.
    """
    deadline = 60.0 if fault.stall or "hang" not in fault.kind else DEADLINE
    args = {"rank": rank, **fault.args}
    job = Job(
        target=fault.target, args=args, world_size=world_size, deadline=deadline, stall=fault.stall or DEADLINE * 2
    )
    begun = time.monotonic()
    report = harness.run(job, explain_hangs=False)
    seconds = time.monotonic() - begun
    failure = report.failure
    said = "; ".join(filter(None, [failure.summary if failure is not None else report.skip_reason, *report.notes]))
    report.discard()
    begun = time.monotonic()
    after = harness.run(Job(target="fault_targets:state", world_size=world_size, deadline=60))
    next_seconds = time.monotonic() - begun
    after.discard()
    limit = PROMPT * patience if fault.stall or "hang" not in fault.kind else deadline + LATE * patience
    kind = failure.kind if failure is not None else "skip" if report.outcome == "skipped" else ""
    if "mounting /" in said:
        return Seen("", "", 0.0, 0.0, said.partition("OSError: ")[2])
    named = "." if rank < 0 else str(rank)
    problems = [
        kind not in fault.kind.split("|") and f"kind {kind!r}",
        not re.search(fault.says.format(rank=named), said) and f"says {said!r}",
        fault.by_rank and rank >= 0 and failure and failure.first_rank != rank and f"blames rank {failure.first_rank}",
        seconds > limit and f"reported after {seconds:.1f} s",
        after.outcome != "passed" and f"next job: {after.failure and after.failure.render()}",
        next_seconds > 10 * patience and f"next job took {next_seconds:.1f} s",
        any(
            reply.value
            and (reply.value[:7] + reply.value[8:])
            != [None, str(Path.cwd()), False, "torch.float32", "cpu", False, 1, 1, 1, False]
            for reply in after.replies
        )
        and f"state leaked: {after.replies[0].value}",
    ]
    return Seen(
        "; ".join(text for text in problems if text), said.removeprefix(f"{job.title}: "), seconds, next_seconds
    )
