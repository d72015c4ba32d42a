"""What runs in the process of a rank: read the job, join the group, call the target, report, end."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from fsdp_testkit.ranks import recorder
from fsdp_testkit.ranks.gpus import device_index

#: Bytes of a reply. Evidence belongs in files in `RankContext.folder`.
REPLY_LIMIT = 1 << 20
TEXT_LIMIT = 60_000
STACK_FRAMES_HIDDEN = {__file__}


@dataclass(slots=True, kw_only=True)
class RankContext:
    """What a target gets as its first argument.

    Attributes:
        rank: global rank, from 0.
        world_size: number of ranks.
        device: ``cpu``, or ``cuda:<index>``, which is also the current CUDA device.
        comm: ``gloo``, ``nccl``, ``fake`` or ``none``.
        store: torch's ``PrefixStore`` of this job; ``None`` with a single process and no group.
        folder: this job's folder, shared by its ranks; the parent finds it as `JobReport.folder`.
        deadline: on the clock of ``time.monotonic``, when the job is ended.
        group_timeout: seconds after which a process group gives up.
        attempt: 0, or 1 in the second run that explains a hang.
        observations: number counted so far.
    """

    rank: int
    world_size: int
    device: str
    comm: str
    store: Any
    folder: Path
    deadline: float
    group_timeout: float = 0.0
    attempt: int = 0
    observations: int = field(default=0)

    def observe(self, count: int = 1) -> None:
        """Count ``count`` observations: a rank that returns without any is a failure."""
        self.observations += int(count)

    @property
    def seconds_left(self) -> float:
        """Seconds until the job is ended by force."""
        return max(0.0, self.deadline - time.monotonic())

    def regroup(self, world_size: int) -> RankContext | None:
        """Leave the process group and make a new one of the job's first ``world_size`` ranks.

        All ranks of the group have to call it, in a job on one machine.

        Args:
            world_size: ranks of the new group, fewer than there are now.

        Returns:
            The context of the new group; ``None`` on a rank that is not part of it.

        Raises:
            ValueError: ``world_size`` is not smaller, or there is no group to leave.
        """
        if not 1 <= world_size < self.world_size:
            raise ValueError(f"world_size={world_size} must be from 1 to {self.world_size - 1}")
        if self.store is None or self.comm not in ("gloo", "nccl"):
            raise ValueError(f"comm={self.comm!r}: there is no process group to leave")
        import torch.distributed as dist

        # Who waits here for a rank that does not come waits in a collective, as the report of a hang then says.
        dist.barrier()
        # Peers may still be receiving from this rank: its connections stay open until all have come here.
        come = dist.PrefixStore(f"leave{self.world_size}", self.store)
        if come.add("come", 1) == self.world_size:
            come.set("all", b"")
        come.wait(["all"], timedelta(seconds=self.group_timeout))
        dist.destroy_process_group()
        if self.rank >= world_size:
            return None
        os.environ.update({"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)})
        smaller = replace(self, world_size=world_size)
        _make_group(smaller)
        return smaller


def main(rank: int, channel: int, spec: int) -> NoReturn:
    """Run one rank and end the process; the caller has redirected the standard streams.

    Args:
        rank: global rank.
        channel: socket to the parent: replies go out, and "all have succeeded" comes in.
        spec: file with the job as JSON.
    """
    started = time.monotonic()
    raw = json.loads(os.pread(spec, os.fstat(spec).st_size, 0))
    os.close(spec)
    reporter = _Reporter(socket.socket(fileno=channel), raw["job"], rank, raw["attempt"], started)
    context = None
    try:
        _settle_in(raw, rank)
        context = _join(raw, rank)
        if raw["recorded"] and context.comm == "gloo":
            recorder.keep_dumping(Path(raw["logs"]), rank)
        function: Any = _find(raw["target"])
        reporter.ready = time.monotonic() - started
        value = function(context, **raw["args"])
        reply = {"status": "ok", "value": value, "observations": context.observations}
    except BaseException as error:  # whatever it is, the parent has to hear of it
        reply = _describe(error) | {"observations": context.observations if context is not None else 0}
        reporter.send(reply)
        if reply["status"] == "raised":
            # Ends without leaving the group: the closed connections tell the other ranks at once.
            reporter.end(1)
        reporter.await_release()  # others may be about to skip as well, and must not fail over this rank
        reporter.end(0)
    reporter.send_value(reply)
    reporter.await_release()
    _leave()
    # No interpreter shutdown: background threads of the process group are known to abort in it now and then.
    reporter.end(0)


class _Reporter:
    def __init__(self, channel: socket.socket, job: str, rank: int, attempt: int, started: float) -> None:
        self.channel = channel
        self.tag = {"job": job, "rank": rank, "attempt": attempt}
        self.started = started
        self.ready = 0.0
        self.pid = os.getpid()

    def send(self, reply: dict[str, Any]) -> None:
        if os.getpid() != self.pid:
            os._exit(70)  # a child that the target forked came back here: it must not answer for the rank
        _flush()
        now = time.monotonic()
        times = {"at": now, "seconds": now - self.started, "ready": self.ready}
        data = json.dumps({**self.tag, **times, **reply}).encode() + b"\n"
        self.channel.setblocking(True)
        self.channel.sendall(data)

    def send_value(self, reply: dict[str, Any]) -> None:
        try:
            size = len(json.dumps(reply["value"]))
        except BaseException as error:
            problem: BaseException = TypeError(f"the target must return JSON data: {type(error).__name__}: {error}")
        else:
            if size <= REPLY_LIMIT - 4096:
                self.send(reply)
                return
            problem = ValueError(f"the target returned {size} bytes of JSON; large values belong in context.folder")
        self.send(_describe(problem))
        self.end(1)

    def await_release(self) -> None:
        # Peers may still be receiving from this rank: its connections stay open until all have replied.
        self.channel.recv(1)

    def end(self, code: int) -> NoReturn:
        _flush()
        os._exit(code)


def _settle_in(raw: dict[str, Any], rank: int) -> None:
    # Gloo's event thread tries a lock that the sending thread holds and, failing, asks epoll again at once. Woken by
    # that very send it pushes the sender off its core, and then spins there until its time slice ends. A batch
    # process is woken without pushing anybody away: a fiftieth of the calls of epoll, a sixth less CPU.
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it only costs time
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.environ.clear()
    os.environ.update(raw["env"])
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(raw["local_ranks"][rank])})
    if raw["recorded"]:
        for name, value in recorder.environment(Path(raw["logs"]), raw["comm"]).items():
            os.environ.setdefault(name, value)
    os.environ.update(raw["job_env"])
    sys.path[:] = raw["path"]
    sys.argv = ["fsdp_testkit-rank"]
    try:
        os.chdir(raw["cwd"])
    except OSError as error:
        print(f"rank {rank}: cannot enter {raw['cwd']}: {error}", file=sys.stderr)  # noqa: T201
    importlib.invalidate_caches()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    faulthandler.enable(file=2, all_threads=True)
    stack = os.open(f"{raw['logs']}/rank{rank}.stack", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True, chain=False)


def _join(raw: dict[str, Any], rank: int) -> RankContext:
    device, comm, world_size = raw["device"], raw["comm"], raw["world_size"]
    store = None
    if comm != "none" or device != "cpu" or raw["store_port"] or "torch" in sys.modules:
        import torch

        if device == "cpu":
            # In a forked process it also renews torch's thread pool. The first call of any thread does so, without a
            # lock: threads that come at once, such as those of a loader, meet "Invalid thread pool!" (torch 2.13).
            torch.set_num_threads(1)
        else:
            index = device_index(raw["local_ranks"][rank], torch.cuda.device_count())
            torch.cuda.set_device(index)
            device = f"cuda:{index}"
    if raw["store_port"]:
        import torch.distributed as dist

        # A forked rank has inherited the level of the server's environment.
        dist.set_debug_level_from_env()
        client = dist.TCPStore(
            raw["store_host"],
            raw["store_port"],
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=raw["group_timeout"]),
        )
        store = dist.PrefixStore(f"{raw['job']}/{raw['attempt']}", client)
    context = RankContext(
        rank=rank,
        world_size=world_size,
        device=device,
        comm=comm,
        store=store,
        folder=Path(raw["folder"]),
        deadline=raw["deadline"],
        group_timeout=raw["group_timeout"],
        attempt=raw["attempt"],
    )
    if store is not None and comm in ("gloo", "nccl"):
        _make_group(context)
    return context


def _make_group(context: RankContext) -> None:
    import torch
    import torch.distributed as dist

    nccl = context.comm == "nccl"
    own = {"device_id": torch.device(context.device)} if nccl else {}
    dist.init_process_group(
        # NCCL moves no CPU tensors; checkpoints and object lists need a group that does.
        "cpu:gloo,cuda:nccl" if nccl else context.comm,
        store=dist.PrefixStore(f"group{context.world_size}", context.store),
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=context.group_timeout),
        **own,
    )


def _find(target: str) -> Any:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _leave() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _describe(error: BaseException) -> dict[str, Any]:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # pytest's is known by name, so that ranks need no pytest.
    skipped = "SkipTest" in kinds or {"Skipped", "OutcomeException"} <= kinds
    try:
        text = "".join(traceback.format_exception(type(error), error, _own_frames(error.__traceback__)))
    except BaseException as problem:
        text = f"(the traceback of {type(error).__name__} cannot be formatted: {type(problem).__name__})"
    try:
        message = str(error)
    except BaseException as problem:
        message = f"<its __str__ raised {type(problem).__name__}>"
    name = type(error).__name__
    return {
        "status": "skipped" if skipped else "raised",
        "error": _cut(message if skipped else (f"{name}: {message}" if message else name)),
        "traceback": _cut(text),
    }


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    kept = trace
    while kept is not None and kept.tb_frame.f_code.co_filename in STACK_FRAMES_HIDDEN:
        kept = kept.tb_next
    return kept or trace


def _cut(text: object) -> str:
    whole = str(text).encode("utf-8", "replace").decode()
    half = TEXT_LIMIT // 2
    return whole if len(whole) <= TEXT_LIMIT else f"{whole[:half]}\n... (cut) ...\n{whole[-half:]}"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # closed or replaced by the target: nothing to save
            continue
