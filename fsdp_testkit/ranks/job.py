"""What goes into the harness and what comes out of it: plain data."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import UsageError

DEVICES = ("cpu", "cuda")
COMMS = ("gloo", "nccl", "fake", "none")
#: Seconds that a job may stand still in its collectives before it counts as hung.
STALL = 5.0
#: Longest deadline, in seconds: a day. Anything longer is a job that nobody waits for.
MAX_DEADLINE = 86400.0
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One function to be run on several ranks.

    Attributes:
        target: ``package.module:function``; every rank calls ``function(context, **args)``, where context is
            a `RankContext`.
        args: JSON data, passed as keyword arguments.
        world_size: number of ranks, at least 1. With ``comm="fake"`` one process is started, which is told
            this world size and sets torch's fake process group up itself.
        device: ``cpu`` or ``cuda``.
        comm: process group that is ready when the target is called: ``gloo``, ``nccl``; ``fake`` and ``none``
            set none up.
        deadline: seconds from the start of the ranks to the forced end of the job; finite and positive.
        env: environment variables set in the ranks only.
        name: shown in reports; the target where empty.
        stall: seconds after which a job that cannot go on is ended before its deadline: all ranks that have not
            replied sleep in collectives, where only another rank could wake them. A number above the deadline
            switches this off, for a test that means to wait for a timeout of its process group.
        min_observations: a rank that returns with fewer calls of ``context.observe`` is a failure.
        together: ranks are dealt to hosts in blocks of this many consecutive ones, such as the shard axis of HSDP.

    Raises:
        UsageError: names the field, its value and what it must be.
    """

    target: str
    args: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    device: str = "cpu"
    comm: str = "gloo"
    deadline: float = 60.0
    env: dict[str, str] = field(default_factory=dict)
    name: str = ""
    stall: float = STALL
    min_observations: int = 1
    together: int = 1

    @property
    def processes(self) -> int:
        """Number of processes that are started."""
        return 1 if self.comm == "fake" else self.world_size

    @property
    def title(self) -> str:
        """The name, or the target."""
        return self.name or self.target

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not _TARGET.fullmatch(self.target):
            raise UsageError(f"target={self.target!r} must look like 'package.module:function'")
        if self.target.startswith("__main__:"):
            raise UsageError(f"target={self.target!r} must live in an importable module: ranks do not run __main__")
        for label, value, known in (("device", self.device, DEVICES), ("comm", self.comm, COMMS)):
            if value not in known:
                raise UsageError(f"{label}={value!r} must be one of {', '.join(known)}")
        if self.comm == "nccl" and self.device != "cuda":
            raise UsageError("comm='nccl' needs device='cuda'")
        for label, count, least in (
            ("world_size", self.world_size, 1),
            ("min_observations", self.min_observations, 0),
            ("together", self.together, 1),
        ):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise UsageError(f"{label}={count!r} must be an integer of at least {least}")
        for label, seconds in (("deadline", self.deadline), ("stall", self.stall)):
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not number or not math.isfinite(seconds) or not 0 < seconds <= MAX_DEADLINE:
                raise UsageError(f"{label}={seconds!r} must be seconds in (0, {MAX_DEADLINE:g}]")
        if not isinstance(self.env, dict) or not all(_is_env(*item) for item in self.env.items()):
            raise UsageError("env must map names to strings; names are not empty and hold no '=' or NUL")
        if not isinstance(self.args, dict) or not all(isinstance(name, str) for name in self.args):
            raise UsageError(f"args must be a dict with names as keys, got {self.args!r}"[:300])
        try:
            same = json.loads(json.dumps(self.args)) == self.args
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"args must be JSON data: {error}") from None
        if not same and not _has_nan(self.args):
            raise UsageError("args must survive JSON unchanged: use lists for tuples and strings for keys")


def _is_env(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    return bool(name) and "=" not in name and "\0" not in name + value


def _has_nan(value: Any) -> bool:
    return "NaN" in json.dumps(value)


@dataclass(slots=True, kw_only=True)
class RankReply:
    """What is known of one rank after a job.

    Attributes:
        rank: global rank.
        host: name of the machine that it ran on; ``""`` for this one.
        status: ``ok``, ``raised``, ``skipped``, ``died`` (ended without a reply), ``hung`` (no reply at the
            deadline), ``stopped`` (ended by the harness after another rank's failure) or ``lost`` (could not
            be started, or its end could not be observed).
        value: what the target returned (JSON data), where ``ok``.
        observations: number that the rank reported.
        seconds: from the start of the rank to its reply; to its end where there was no reply.
        ready_seconds: from the start of the rank until its process group was ready and the target imported.
        exitcode: exit status; ``None`` where a signal ended it or the end was not observed.
        signal: name of the signal that ended the process, such as ``SIGSEGV``; ``""`` where none did, or where
            the harness sent it.
        error: ``TypeName: message`` of the exception, reason of the skip, native error text, or the place of a
            rank that had to be stopped.
        traceback: formatted on the rank.
        stderr: the tail of what the rank wrote to stdout and stderr.
        stack: Python stacks of all its threads, where it was asked for them.
        collective: the collective it sat in when asked, with its place, or ``""``.
        consequence: whether the failure follows from another rank's end ("connection closed by peer").
        log: file with everything that the rank wrote to stdout and stderr.
    """

    rank: int
    host: str = ""
    status: str
    value: Any = None
    observations: int = 0
    seconds: float = 0.0
    ready_seconds: float = 0.0
    exitcode: int | None = None
    signal: str = ""
    error: str = ""
    traceback: str = ""
    stderr: str = ""
    stack: str = ""
    collective: str = ""
    consequence: bool = False
    log: Path | None = None


@dataclass(slots=True, kw_only=True)
class JobFailure:
    """Why a job failed.

    Attributes:
        kind: ``exception``, ``exit``, ``signal``, ``hang``, ``lone_skip``, ``no_observation`` or ``lost``.
        first_rank: the rank to look at first: the root cause as far as it can be told.
        summary: one line that stands alone.
        text: the full account; see `render`.
        explanation: which collectives of a job that hung do not match, or ``""``.
    """

    kind: str
    first_rank: int
    summary: str
    text: str = ""
    explanation: str = ""

    def render(self) -> str:
        """Return the whole account: root cause first, then the other ranks, then where the logs are."""
        parts = [self.summary, self.text]
        if self.explanation:
            parts.insert(1, self.explanation)
        return "\n\n".join(part for part in parts if part)


def indent(text: str) -> str:
    """Return ``text`` with each line moved two columns to the right."""
    return "\n".join(f"  {line}" for line in text.splitlines())


@dataclass(slots=True, kw_only=True)
class JobReport:
    """What came of a job.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``.
        replies: one per process, by rank.
        failure: set where ``outcome`` is ``failed``.
        notes: oddities that are no failures, such as an abort at exit after success.
        seconds: wall time of the job, without the start of the rank server.
        folder: the job's folder: files that the target wrote, and the ranks' logs under ``logs``.
        skip_reason: the first rank's reason where ``outcome`` is ``skipped``.
    """

    outcome: str
    replies: list[RankReply]
    failure: JobFailure | None
    notes: list[str]
    seconds: float
    folder: Path
    skip_reason: str = ""

    def discard(self) -> None:
        """Delete the job's folder. Memory-mapped evidence stays readable until it is dropped."""
        shutil.rmtree(self.folder, ignore_errors=True)


def pick_comm(device: str, world_size: int, gpu_count: int) -> tuple[str, str]:
    """Choose the process group for ``world_size`` ranks on ``device``.

    Args:
        device: ``cpu`` or ``cuda``.
        world_size: number of ranks.
        gpu_count: GPUs that are visible.

    Returns:
        (comm, reason): ``nccl`` where each rank has its own GPU, else ``gloo``; the reason is one sentence.

    Raises:
        UsageError: unknown device, or ``cuda`` without any GPU.
    """
    if device not in DEVICES:
        raise UsageError(f"device={device!r} must be one of {', '.join(DEVICES)}")
    if world_size < 1 or gpu_count < 0:
        raise UsageError(f"world_size={world_size} must be at least 1 and gpu_count={gpu_count} at least 0")
    if device == "cpu":
        return "gloo", "CPU tensors travel over gloo"
    if gpu_count == 0:
        raise UsageError("device='cuda' needs a GPU, and none is visible")
    if gpu_count < world_size:
        return "gloo", f"{world_size} ranks share {gpu_count} GPU(s), and NCCL wants one GPU for each rank"
    return "nccl", f"each of the {world_size} ranks has its own GPU ({gpu_count} visible)"
