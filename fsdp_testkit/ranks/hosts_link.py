"""Pytest's side of ranks on other machines: one connection to each agent, which together look like one rank server.

`Run` talks to its ranks through a socket and a pipe each, as on one machine; this file passes on what comes from the
agents, and gives processes numbers and times that hold here. There is no thread: everything moves while `Run` waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks.agent import is_loopback
from fsdp_testkit.ranks.hosts import FIRST_PATIENCE, PATIENCE, Hosts, greet
from fsdp_testkit.ranks.link import START_LIMIT, STOP_LIMIT, Place, Store
from fsdp_testkit.ranks.mirror import TOKEN, TRAVEL_LIMIT, Mirror, TooLargeError
from fsdp_testkit.ranks.place import deal
from fsdp_testkit.ranks.rank import REPLY_LIMIT
from fsdp_testkit.ranks.rank_pipes import Pipe, Pipes
from fsdp_testkit.ranks.translate import host_spec, our_reply
from fsdp_testkit.ranks.wire import Wire, WireError

#: Seconds for files and answers after a job.
COLLECT_LIMIT = 60.0
#: The same for a host that has not told the end of a rank which was killed: it will hardly answer this.
SILENT_LIMIT = 0.5
#: Questions that the difference between two clocks is measured with.
CLOCK_QUESTIONS = 5
#: Numbers of processes of different agents must differ.
_PIDS = 1 << 32


@dataclass(slots=True, eq=False)
class _Agent:
    """What this side holds for one connection."""

    index: int
    host: str
    address: tuple[str, int]
    wire: Wire
    clock: float = 0.0
    """Their clock minus ours, in seconds."""
    mirror: Mirror | None = None
    lost: str = ""
    killed: set[int] = field(default_factory=set)
    """Processes of the job whose end was asked for and not yet told."""
    answers: deque[dict[str, Any]] = field(default_factory=deque)

    def __str__(self) -> str:
        return f"host {self.host} ({self.address[0]}:{self.address[1]})"


@dataclass(slots=True, eq=False)
class _Seat:
    """What this side holds for one rank."""

    agent: _Agent
    stack: Path
    channel: Pipe
    output: Pipe
    pending: bytes = b""
    alive: bool = False


class HostsLink:
    """The agents of a session as one rank server; see `link.Link`.

    Args:
        hosts: where they are.
        method: ``fork`` or ``spawn``.
        preload: modules that rank servers import.
        folder: of the harness; files in it travel to and from hosts that do not share it.
        env: what rank servers have in their environment beside their host's.
    """

    def __init__(self, hosts: Hosts, method: str, preload: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.hosts = hosts
        self.method = method
        self.preload = list(preload)
        self.folder = folder
        self.env = dict(env)
        self.problems: list[str] = []
        self.agents: list[_Agent] = []
        self.seats: dict[int, _Seat] = {}
        self.places: list[tuple[int, Place]] = []
        self.queue: deque[dict[str, Any]] = deque()
        self.selector = selectors.EpollSelector()
        # readable while the queue holds something, also where it came in while something else was waited for
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.selector.register(self.bell, selectors.EVENT_READ, None)
        self.pipes = Pipes(
            self.selector,
            heard=lambda rank: self._send(self.seats[rank].agent, {"release": rank}),
            closed=lambda rank: self._send(self.seats[rank].agent, {"hush": rank}),
        )

    def fileno(self) -> int:
        """Return the selector's: it is readable when any of its members is ready."""
        return self.selector.fileno()

    # --- connections ---------------------------------------------------------------------------------------------

    def wait_ready(self) -> bool:
        """Connect to all agents and wait for their rank servers; replace connections that were lost."""
        if self.agents:
            self._pump(0.0)
        if self.agents and not any(agent.lost for agent in self.agents):
            return False
        lost = [f"{agent} was connected anew: {agent.lost}" for agent in self.agents if agent.lost]
        self._disconnect(STOP_LIMIT)
        known = bool(self.hosts.agents)
        end = time.monotonic() + (PATIENCE if known else FIRST_PATIENCE)
        token = secrets.token_hex(16)
        (self.folder / TOKEN).write_text(token)
        for index, (address, name, _) in enumerate(self.hosts.find()):
            wire, _ = greet(address, self.hosts.secret, end, name)
            self.agents.append(_Agent(index, name, address, wire))
            self.selector.register(wire.socket, selectors.EVENT_READ, self.agents[-1])
        self._check_addresses()
        try:
            self._open(token)
        except WireError as error:
            raise EnvironmentLacksError(str(error)) from None
        self.problems += lost
        return True

    def _check_addresses(self) -> None:
        names = {agent.host: agent for agent in self.agents}
        local = [agent for agent in names.values() if is_loopback(agent.wire.socket.getpeername()[0])]
        if local and len(local) < len(names):
            raise UsageError(f"{local[0]} is named by a loopback address: the other hosts could not reach it")

    def _open(self, token: str) -> None:
        request = {
            "method": self.method,
            "preload": self.preload,
            "env": self.env,
            "folder": str(self.folder),
            "token": token,
            "path": [str(entry) for entry in sys.path],
        }
        self.problems = []
        for agent in self.agents:
            self._send(agent, {"serve": True})
            self._send(agent, {"open": request})
            # one after the other until the folder is there: two agents of one host must not both carry files
            self._wait(agent, "rooted", START_LIMIT)
        for agent in self.agents:
            opened = self._wait(agent, "opened", START_LIMIT)["opened"]
            self.problems.extend(opened["problems"])
            if opened["carries"]:
                agent.mirror = Mirror(self.folder)
            agent.clock = self._clock(agent)

    def _clock(self, agent: _Agent) -> float:
        best, difference = float("inf"), 0.0
        for number in range(CLOCK_QUESTIONS):
            asked = time.monotonic()
            self._send(agent, {"clock": number})
            answer = self._wait(agent, "clock", COLLECT_LIMIT)
            took = time.monotonic() - asked
            if took < best:
                best, difference = took, answer["now"] - (asked + took / 2)
        return difference

    def close(self, *, at_once: bool = False) -> None:
        """End all rank servers; wait for the good-byes of those that answer, unless ``at_once``."""
        self._disconnect(0.5 if at_once else STOP_LIMIT)
        self.selector.close()
        os.close(self.bell)
        with contextlib.suppress(OSError):
            (self.folder / TOKEN).unlink()

    def _disconnect(self, limit: float) -> None:
        for agent in self.agents:
            self._send(agent, {"bye": True})
        end = time.monotonic() + limit
        while any(not agent.lost for agent in self.agents) and (left := end - time.monotonic()) > 0:
            self._pump(left)
        self._clear_seats()
        for agent in self.agents:
            if not agent.lost:
                self.selector.unregister(agent.wire.socket)
            agent.wire.close()
        self.agents.clear()

    def _clear_seats(self) -> None:
        for seat in self.seats.values():
            self.pipes.shut(seat.channel)
            self.pipes.shut(seat.output)
        self.seats.clear()
        self.queue.clear()
        for agent in self.agents:
            agent.killed.clear()

    # --- one job -------------------------------------------------------------------------------------------------

    def place(self, ranks: int, together: int) -> list[Place]:
        """Deal the ranks, and bring the files that have changed to the hosts."""
        self.places = deal(self.hosts.room(), ranks, together)
        self._clear_seats()
        for agent in {self.agents[index].host: self.agents[index] for index, _ in self.places}.values():
            for carrier in self.agents:
                if carrier.host == agent.host and carrier.mirror is not None:
                    self._push(carrier)
        return [place for _, place in self.places]

    def _push(self, agent: _Agent) -> None:
        assert agent.mirror is not None
        try:
            agent.mirror.send_changes(agent.wire.send)
        except TooLargeError as error:
            raise UsageError(f"{agent}: {error}") from None
        except WireError as error:
            self._lose(agent, str(error))

    def open_store(self) -> Store:
        """Open a store on the first host: ranks of all hosts reach each other, and so the store."""
        agent = self.agents[0]
        self._send(agent, {"store": True})
        try:
            host, port = self._wait(agent, "store", START_LIMIT)["store"]
        except WireError as error:
            raise EnvironmentLacksError(str(error)) from None
        return Store(None, host, port)

    def start(self, rank: int, files: Sequence[int]) -> None:
        """Send the job to the agent of a rank; a lost agent is told by `receive`."""
        channel, memory, log = files
        index, place = self.places[rank]
        agent = self.agents[index]
        spec = json.loads(os.pread(memory, os.fstat(memory).st_size, 0))
        self.seats[rank] = _Seat(
            agent,
            Path(spec["logs"]) / f"rank{rank}.stack",
            self.pipes.add(rank, channel, is_channel=True),
            self.pipes.add(rank, log),
        )
        host_spec(spec, [other for _, other in self.places], place, agent.clock, self.hosts.env)
        if agent.lost:
            self._tell_loss(agent)
        else:
            self._send(agent, {"start": rank, "spec": spec})

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a rank."""
        index, there = divmod(pid, _PIDS)
        agent = self.agents[index - 1]
        if number == signal.SIGKILL:
            agent.killed.add(there)
        self._send(agent, {"signal": number, "pid": there})

    def silent(self, rank: int) -> str:
        """Tell whether the host of a rank that was asked for its stack has answered at all."""
        seat = self.seats[rank]
        return "" if seat.alive else f"{seat.agent} does not answer"

    def receive(self) -> list[dict[str, Any]] | None:
        """Move what can be moved; return what rank servers said, and which ranks were lost."""
        self._pump(0.0)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)
        messages = list(self.queue)
        self.queue.clear()
        return messages

    def _announce(self, message: dict[str, Any]) -> None:
        self.queue.append(message)
        os.eventfd_write(self.bell, 1)

    def collect(self) -> dict[str, str]:
        """Bring the files of the last job here."""
        problems: dict[str, str] = {}
        used = {place.host for _, place in self.places}
        for agent in self.agents:
            if agent.mirror is None or agent.host not in used:
                continue
            try:
                self._send(agent, {"collect": True, "limit": TRAVEL_LIMIT})
                limit = SILENT_LIMIT if agent.killed else COLLECT_LIMIT
                problem = self._wait(agent, "collected", limit)["collected"]
            except WireError as error:
                problem = str(error)
            if problem:
                problems[agent.host] = problem
        return problems

    def warm(self, target: str, args: dict[str, Any], limit: float) -> str | None:
        """Run a function in all rank servers."""
        end = time.monotonic() + limit
        for agent in self.agents:
            self._send(agent, {"warm": target, "args": args})
        problems = []
        for agent in self.agents:
            try:
                problems.append(str(self._wait(agent, "warmed", end - time.monotonic())["warmed"]))
            except WireError:
                return None
        return next((problem for problem in problems if problem), "")

    # --- what moves ----------------------------------------------------------------------------------------------

    def _send(self, agent: _Agent, message: dict[str, Any]) -> None:
        if agent.lost:
            return
        try:
            agent.wire.send(message)
        except WireError as error:
            self._lose(agent, str(error))

    def _wait(self, agent: _Agent, name: str, limit: float) -> dict[str, Any]:
        """Wait for an answer of one agent; raise `WireError` where it does not come."""
        end = time.monotonic() + limit
        while True:
            for answer in agent.answers:
                if name in answer:
                    agent.answers.remove(answer)
                    return answer
            if agent.lost:
                raise WireError(f"{agent}: {agent.lost}")
            if (left := end - time.monotonic()) <= 0:
                raise WireError(f"{agent} did not answer within {limit:g} s")
            self._pump(left)

    def _pump(self, wait: float) -> None:
        for key, mask in self.selector.select(wait):
            if isinstance(key.data, _Agent):
                self._hear(key.data)
            elif key.data is None:
                continue  # the bell
            else:
                self.pipes.ready(key.data, mask)

    def _hear(self, agent: _Agent) -> None:
        if agent.lost:
            return
        try:
            for message, data in agent.wire.arrived():
                self._take(agent, message, data)
        except (WireError, OSError, KeyError, TypeError, ValueError) as error:
            self._lose(agent, str(error) if isinstance(error, WireError) else f"{type(error).__name__}: {error}")

    def _take(self, agent: _Agent, message: dict[str, Any], data: bytes) -> None:
        if "server" in message:
            self._take_server(agent, message["server"])
        elif "reply" in message:
            self._take_reply(self._seat(agent, message["reply"]), data)
        elif "log" in message:
            self.pipes.write(self._seat(agent, message["log"]).output, data)
        elif "stack" in message:
            seat = self._seat(agent, message["stack"])
            seat.stack.write_bytes(data)
        elif "alive" in message:
            self._seat(agent, message["alive"]).alive = True
        elif "note" in message:
            self._announce({"note": f"{message['note']} (host {agent.host})"})
        elif "cut" in message:
            self.pipes.finish(self._seat(agent, message["cut"]).channel)
        elif "file" in message or "made" in message or "gone" in message:
            if agent.mirror is None:
                raise WireError("it sent a file that nobody asked for")
            agent.mirror.take(message, data)
        elif "failed" in message:
            self._lose(agent, str(message["failed"]))
        else:
            agent.answers.append(message)

    def _seat(self, agent: _Agent, rank: Any) -> _Seat:
        seat = self.seats[rank]
        if seat.agent is not agent:
            raise WireError(f"it spoke for rank {rank}, which is not its own")
        return seat

    def _take_server(self, agent: _Agent, message: dict[str, Any]) -> None:
        base = (agent.index + 1) * _PIDS
        if "warmed" in message:
            agent.answers.append(message)
        elif "ended" in message:
            if "rank" in message and message["rank"] in self.seats:
                seat = self._seat(agent, message["rank"])
                self.pipes.finish(seat.channel)
                self.pipes.finish(seat.output)
            agent.killed.discard(message["ended"])
            self._announce({"ended": base + message["ended"], "code": message["code"]})
        elif "started" in message:
            self._announce({"started": message["started"], "pid": base + message["pid"]})
        elif "unstarted" in message:
            self._announce({"unstarted": message["unstarted"], "error": str(message["error"])})

    def _take_reply(self, seat: _Seat, data: bytes) -> None:
        *lines, seat.pending = (seat.pending + data).split(b"\n")
        for line in lines:
            self.pipes.write(seat.channel, our_reply(line, seat.agent.clock) + b"\n")
        if len(seat.pending) > REPLY_LIMIT:  # no reply: `Run` will say so
            self.pipes.write(seat.channel, seat.pending)
            seat.pending = b""

    def _lose(self, agent: _Agent, why: str) -> None:
        if agent.lost:
            return
        agent.lost = why
        self.selector.unregister(agent.wire.socket)
        agent.wire.close()
        self._tell_loss(agent)

    def _tell_loss(self, agent: _Agent) -> None:
        ranks = [rank for rank, seat in self.seats.items() if seat.agent is agent]
        if ranks:
            self._announce({"lost": ranks, "error": f"{agent.lost} ({agent.address[0]}:{agent.address[1]})"})
