"""One run of a job: the wait loop between the state machine and the processes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_testkit.ranks import machine, recorder
from fsdp_testkit.ranks.job import Job, JobReport, RankReply
from fsdp_testkit.ranks.link import Link, Place, Store, is_stopped
from fsdp_testkit.ranks.machine import Phase
from fsdp_testkit.ranks.output import Output
from fsdp_testkit.ranks.rank import REPLY_LIMIT
from fsdp_testkit.ranks.reply import objection
from fsdp_testkit.ranks.server import UNFIT
from fsdp_testkit.ranks.spec import checks_collectives, rank_spec
from fsdp_testkit.ranks.stacks import is_consequence, is_whole, native_error, own_part, sits_in, tail, waits_for_others
from fsdp_testkit.ranks.stillness import POLL, Stillness, Watch
from fsdp_testkit.ranks.verdict import judge

LOG_TAIL = 8000
STACK_LIMIT = 100_000
#: Seconds between looks at the stack files while they are being written.
STACK_POLL = 0.03
#: Bytes that a rank may send in all: one reply, and little else.
RECEIVE_LIMIT = REPLY_LIMIT + 65536
#: Messages of a rank that are discarded before its channel is closed.
DISCARD_LIMIT = 10


@dataclass(slots=True)
class _Seat:
    """What the parent holds for one rank."""

    rank: int
    channel: socket.socket
    output: Output
    stack: Path
    started: float
    still: Stillness
    pid: int = 0
    buffer: bytes = b""
    received: int = 0
    discarded: int = 0
    reply: dict[str, Any] = field(default_factory=dict)
    ended: float = 0.0
    problem: str = ""
    offence: str = ""
    stack_size: int = -1
    kill_when_started: bool = False


class Run:
    """One attempt at a job; `execute` it once, then `close` it."""

    def __init__(self, job: Job, identity: str, attempt: int, folder: Path, link: Link, store: Store | None) -> None:
        self.job = job
        self.identity = identity
        self.attempt = attempt
        self.folder = folder
        self.link = link
        self.store = store
        self.places: list[Place] = []
        self.notes = list(link.problems)
        self.server_lost = False
        self.seats: list[_Seat] = []
        self.pids: dict[int, _Seat] = {}
        self.selector = selectors.DefaultSelector()
        self.logs = folder / "logs"
        self.watch = Watch(job.stall)

    def execute(self, grace: float) -> JobReport:
        """Start the ranks, wait for their end and judge; ``grace`` in seconds."""
        # The harness's own folder is not made again: one that is gone is an error that has to be seen.
        self.folder.mkdir()
        self.logs.mkdir()
        self.places = self.link.place(self.job.processes, self.job.together)
        begun = time.monotonic()
        self.state = machine.begin(self.job.processes, deadline=self.job.deadline, grace=grace, now=begun)
        self.selector.register(self.link, selectors.EVENT_READ, None)
        self._start(begun)
        while self.state.phase is not Phase.DONE:
            wait = min(1.0, self.state.until - time.monotonic())
            if self._may_stall():
                wait = min(wait, POLL)
            if self.state.phase in (Phase.DUMPING, Phase.LOOKING):
                wait = min(wait, STACK_POLL)
            for key, _ in self.selector.select(max(0.0, wait)):
                if key.data is None:
                    self._hear_server()
                elif isinstance(key.data, Output):
                    if not key.data.drain():
                        self.selector.unregister(key.fileobj)
                else:
                    self._hear_rank(key.data)
            if self.state.phase in (Phase.DUMPING, Phase.LOOKING):
                self._look_for_stacks()
            elif self._may_stall():
                self._look_for_life()
            self._feed(machine.Tick())
        return self._report(time.monotonic() - begun)

    def close(self) -> None:
        """Give back the file descriptors."""
        self.selector.close()
        for seat in self.seats:
            seat.channel.close()
            seat.output.close()

    def _start(self, begun: float) -> None:
        spec = rank_spec(self.job, self.identity, self.attempt, self.folder, self.logs, self.store, begun)
        memory = os.memfd_create("job")  # not on disk: the environment may hold secrets
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(json.dumps(spec).encode())
            for rank in range(self.job.processes):
                output = Output(self.logs / f"rank{rank}.log")
                try:
                    ours, theirs = socket.socketpair()
                except OSError:
                    output.close()
                    raise
                with theirs:
                    now = time.monotonic()
                    seat = _Seat(rank, ours, output, self.logs / f"rank{rank}.stack", now, Stillness(now))
                    self.seats.append(seat)
                    self.link.start(rank, [theirs.fileno(), memory, output.inlet])
                    output.close_inlet()
                ours.setblocking(False)
                self.selector.register(ours, selectors.EVENT_READ, seat)
                self.selector.register(output.outlet, selectors.EVENT_READ, output)
        finally:
            os.close(memory)

    def _hear_server(self) -> None:
        messages = self.link.receive()
        if messages is None:
            self.selector.unregister(self.link)
            messages = [{"lost": range(len(self.seats)), "error": "the rank server died, and its ranks with it"}]
        for message in messages:
            self._take_message(message)

    def _take_message(self, message: dict[str, Any]) -> None:
        if "lost" in message:
            self.server_lost = True
            for seat in (self.seats[rank] for rank in message["lost"]):
                self._hear_rank(seat)
                seat.problem = seat.problem or message["error"]
            self._feed(machine.ServerLost(tuple(message["lost"])))
        elif "note" in message:
            self.notes.append(message["note"])
        elif "started" in message:
            seat = self.seats[message["started"]]
            seat.pid = message["pid"]
            self.pids[seat.pid] = seat
            if seat.kill_when_started:
                self.link.signal(seat.pid, signal.SIGKILL)
        elif "unstarted" in message:
            seat = self.seats[message["unstarted"]]
            seat.problem = message["error"]
            self._feed(machine.Unstarted(seat.rank))
        elif message.get("ended") in self.pids:
            seat = self.pids.pop(message["ended"])
            self._hear_rank(seat)  # what it sent before it ended comes first
            seat.ended = time.monotonic()
            self._feed(machine.Exited(seat.rank, message["code"]))

    def _hear_rank(self, seat: _Seat) -> None:
        while seat.channel.fileno() >= 0:
            try:
                data = seat.channel.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:  # its end is told by the server
                with contextlib.suppress(KeyError):
                    self.selector.unregister(seat.channel)
                self._cut(seat, "closed its channel to the parent, so that no reply could come")
                return
            *lines, seat.buffer = (seat.buffer + data).split(b"\n")
            for line in lines[: DISCARD_LIMIT + 1]:
                self._take(seat, line)
            seat.received += len(data)
            # Or it could keep the parent busy past the deadline.
            if seat.received > RECEIVE_LIMIT or seat.discarded > DISCARD_LIMIT:
                self.notes.append(f"rank {seat.rank} sent more than a reply: its channel was closed")
                self.selector.unregister(seat.channel)
                seat.channel.close()
                seat.offence = "sent more than a reply, so that its channel was closed"
                self._cut(seat, seat.offence)

    def _cut(self, seat: _Seat, problem: str) -> None:
        if self.state.ranks[seat.rank].status == "running":
            seat.problem = seat.problem or seat.offence or problem
        self._feed(machine.Cut(seat.rank))

    def _take(self, seat: _Seat, line: bytes) -> None:
        problem = ""
        reply: Any = None
        try:
            reply = json.loads(line)
        except ValueError:
            problem = "is no JSON"
        else:
            problem = objection(reply, (self.identity, seat.rank, self.attempt))
        if problem:
            seat.discarded += 1
            self.notes.append(f"a reply on the channel of rank {seat.rank} was discarded: it {problem}")
        elif seat.reply:
            self.notes.append(f"rank {seat.rank} replied more than once: its first reply counts")
            seat.discarded += 1
        else:
            # A late one is noted by the state machine and must not change the report.
            if self.state.ranks[seat.rank].status == "running":
                seat.reply = reply
            self._feed(machine.Replied(seat.rank, reply["status"]))

    def _feed(self, event: machine.Event) -> None:
        self.state, actions = machine.step(self.state, event, time.monotonic())
        for action in actions:
            if isinstance(action, machine.Abandon):
                self.server_lost = True
                continue
            if isinstance(action, machine.Look):
                stacks = [own_part(tail(self.seats[rank].stack, STACK_LIMIT)) for rank in action.ranks]
                self._feed(machine.Looked(all(map(waits_for_others, stacks))))
                continue
            for rank in action.ranks:
                self._act(action, self.seats[rank])

    def _act(self, action: machine.Release | machine.Dump | machine.Kill, seat: _Seat) -> None:
        if isinstance(action, machine.Release):
            with contextlib.suppress(OSError):
                seat.channel.send(b"e")
        elif isinstance(action, machine.Kill):
            seat.kill_when_started = not seat.pid
            if seat.pid:
                self.link.signal(seat.pid, signal.SIGKILL)
        elif seat.pid:
            with contextlib.suppress(OSError):
                os.truncate(seat.stack, 0)  # of a look before this one
            seat.stack_size = -1
            if self.job.comm == "nccl":
                recorder.ask_nccl(self.logs, seat.rank)
            self.link.signal(seat.pid, signal.SIGUSR1)
            if is_stopped(seat.pid):
                self.notes.append(f"rank {seat.rank} was in the stopped state (SIGSTOP); continued for its stack")
                self.link.signal(seat.pid, signal.SIGCONT)

    def _may_stall(self) -> bool:
        """Tell whether ranks could be waiting for each other without an end before the deadline."""
        soon = self.state.deadline - time.monotonic() <= self.watch.stall
        if any(place.host for place in self.places):  # their processes cannot be looked at from here
            return False
        grouped = self.job.comm in ("gloo", "nccl") and self.job.processes > 1
        checked = checks_collectives(self.job, self.attempt)
        return self.state.phase is Phase.RUNNING and grouped and not checked and not soon

    def _look_for_life(self) -> None:
        waiting = [seat for seat in self.seats if self.state.ranks[seat.rank].status == "running"]
        if self.watch.look([(seat.pid, seat.still) for seat in waiting], time.monotonic()):
            self._feed(machine.StoodStill())

    def _look_for_stacks(self) -> None:
        for seat in self.seats:
            size = seat.stack.stat().st_size if seat.stack.exists() else 0
            # faulthandler writes no end mark. A dump of the main thread ends with the frame that started the rank; what
            # does not grow between two looks may still be half of it, on a machine that is busy.
            if size > 0 and size == seat.stack_size and is_whole(tail(seat.stack, LOG_TAIL)):
                self._feed(machine.Dumped(seat.rank))
            seat.stack_size = size

    def _report(self, seconds: float) -> JobReport:
        for seat in self.seats:
            seat.output.finish()
            if seat.output.problem:
                self.notes.append(f"rank {seat.rank} {seat.output.problem}")
        replies = [self._reply(seat) for seat in self.seats]
        self._collect(replies)
        times = [
            float(seat.reply.get("at", 0.0)) or self.state.ranks[seat.rank].settled_at or float("inf")
            for seat in self.seats
        ]
        outcome, failure = judge(self.job, replies, times, self.watch.stood_for if self.state.stuck else 0.0)
        return JobReport(
            outcome=outcome,
            replies=replies,
            failure=failure,
            notes=[*self.notes, *self.state.notes],
            seconds=seconds,
            folder=self.folder,
            skip_reason=replies[0].error if outcome == "skipped" else "",
        )

    def _collect(self, replies: list[RankReply]) -> None:
        """Bring what the ranks wrote here; a rank whose files did not come has not succeeded."""
        for host, problem in self.link.collect().items():
            for reply in replies:
                if reply.host == host and reply.status == "ok":
                    reply.status, reply.error = "lost", f"its files did not come: {problem}"

    def _reply(self, seat: _Seat) -> RankReply:
        known, sent = self.state.ranks[seat.rank], seat.reply
        log = seat.output.tail(LOG_TAIL)
        stack = own_part(tail(seat.stack, STACK_LIMIT)) if known.status in ("hung", "stopped") else ""
        collective, place = sits_in(stack) if stack else ("", "")
        error = str(sent.get("error", ""))
        if known.status == "died":
            error = error or seat.offence or native_error(log)
        elif known.status == "lost":
            error = error or seat.problem
        elif known.status in ("hung", "stopped"):
            error = place if stack else self.link.silent(seat.rank)
        by_signal = known.code is not None and known.code < 0
        own_signal = by_signal and not known.killed and known.status not in ("hung", "stopped")
        ended = seat.ended or time.monotonic()
        return RankReply(
            rank=seat.rank,
            host=self.places[seat.rank].host,
            status=known.status,
            value=sent.get("value"),
            observations=sent.get("observations", 0),
            seconds=sent.get("seconds", ended - seat.started),
            ready_seconds=sent.get("ready", 0.0),
            exitcode=None if by_signal else known.code,
            signal=_signal_name(-known.code) if known.code is not None and own_signal else "",
            error=error,
            traceback=str(sent.get("traceback", "")),
            stderr=log,
            stack=stack,
            collective=collective,
            # A rank that could not reply broke off with its parent, and not with another rank.
            consequence=known.status in ("raised", "died") and known.code != UNFIT and is_consequence(error),
            log=seat.output.path,
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
