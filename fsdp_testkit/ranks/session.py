"""An agent's side of one connection: a rank server on this host, for one harness of one pytest, until either ends.

It adds nothing to what `server`, `rank` and `stacks` do on one machine: ranks are forked (or spawned) for one job by a
rank server, and this process passes on what they say. Times are on this host's clock; the other side converts.

| from pytest | |
|---|---|
| ``open`` | method, preload, env, path, folder and token: start the rank server |
| ``clock`` | what time is it? |
| ``start`` | a rank, with the job as its ``spec`` |
| ``signal`` | a number, to a process that the server started |
| ``release``, ``hush`` | all ranks have replied; do not listen to this rank any more |
| ``warm`` | run a function in the rank server |
| ``file``, ``made``, ``gone`` | see `mirror` |
| ``collect`` | send what has changed in the folder |
| ``store`` | open a store that the ranks of all hosts meet at |
| ``bye`` | end |

| to pytest | |
|---|---|
| ``rooted``, ``opened``, ``failed`` | the folder is there, the rank server is, or something is not |
| ``clock`` | the time |
| ``server`` | a message of the rank server |
| ``reply``, ``log``, ``stack`` | of a rank: bytes from its channel, what it printed, its stack |
| ``cut``, ``alive``, ``note`` | a rank has closed its channel; a signal has arrived here; something odd |
| ``collected`` | all changes were sent, or why not |
| ``store`` | its address and port |
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.ranks.folders import hold
from fsdp_testkit.ranks.link import ServerLink, Store, is_stopped, open_store
from fsdp_testkit.ranks.mirror import STAYS, TOKEN, Mirror, TooLargeError
from fsdp_testkit.ranks.output import Output
from fsdp_testkit.ranks.spec import ONE_THREAD
from fsdp_testkit.ranks.stacks import tail
from fsdp_testkit.ranks.wire import SECRET_FILE_VARIABLE, SECRET_VARIABLE, Frame, Wire, WireError

#: Bytes of a rank's output and of its stacks that travel.
LOG_LIMIT = 1 << 18
#: Seconds between looks at a stack that is being written.
STACK_POLL = 0.03
#: What torchrun tells its own processes: a job has a world of its own.
_LAUNCHER = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "WORLD_SIZE",
    SECRET_VARIABLE,
    SECRET_FILE_VARIABLE,
)


def host_environment() -> dict[str, str]:
    """Return this process's environment without what its launcher said of its place, and without the secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith("TORCHELASTIC_")
    }


@dataclass(slots=True)
class _Seat:
    rank: int
    channel: socket.socket
    output: Output
    stack: Path
    dumping: bool = False
    stack_size: int = -1


class Session:
    """Serves one authenticated connection; `serve` returns when the other side is gone or has said good-bye.

    Args:
        wire: the connection.
        interface: network interface that the ranks of other hosts reach this one through.
        address: of this host on it.
    """

    def __init__(self, wire: Wire, interface: str, address: str) -> None:
        self.wire = wire
        self.interface = interface
        self.address = address
        self.selector = selectors.DefaultSelector()
        self.link: ServerLink | None = None
        self.opened = False
        self.private = Path()
        #: Holds the lock of the folder that is this session's own.
        self.held = -1
        self.mirror: Mirror | None = None
        self.owns_root = False
        self.seats: dict[int, _Seat] = {}
        self.pids: dict[int, _Seat] = {}
        self.store: Store | None = None

    def serve(self) -> None:
        """Serve until the connection ends; then end the ranks and delete the files."""
        self.selector.register(self.wire.socket, selectors.EVENT_READ, None)
        try:
            ended = self._obey_all(self.wire.complete())
            while not ended:
                watching = any(seat.dumping for seat in self.seats.values())
                for key, _ in self.selector.select(STACK_POLL if watching else None):
                    if self.selector.get_map().get(key.fd) is not key:
                        continue  # closed by what came before it in this round: it must not be heard again
                    if key.data is None:
                        ended = self._obey_all(self.wire.arrived())
                    elif key.data is self.link:
                        self._hear_server()
                    elif isinstance(key.data, Output):
                        if not key.data.drain():
                            self.selector.unregister(key.fileobj)
                    else:
                        self._hear_rank(key.data)
                self._look_for_stacks()
        except WireError:
            return  # pytest is gone, or out of reach: it says so itself
        finally:
            self.close()

    def close(self) -> None:
        """End the ranks, then delete what this session has written."""
        if self.link is not None:
            self.link.close()
        for seat in self.seats.values():
            seat.channel.close()
            seat.output.close()
        self.store = None
        if self.private != Path():
            shutil.rmtree(self.private, ignore_errors=True)
        if self.held >= 0:
            os.close(self.held)
            self.held = -1
        if self.owns_root and self.mirror is not None:
            shutil.rmtree(self.mirror.root, ignore_errors=True)
        self.wire.close()  # last: who waits for it knows that nothing is left

    def _obey_all(self, frames: list[Frame]) -> bool:
        """Do what was asked for; return whether it was to end."""
        for message, data in frames:
            if "bye" in message:
                return True
            self._obey(message, data)
        return False

    def _obey(self, message: dict[str, Any], data: bytes) -> None:
        if "file" in message or "made" in message or "gone" in message:
            assert self.mirror is not None
            try:
                self.mirror.take(message, data)
            except OSError as error:
                self.wire.send({"failed": f"cannot write into {self.mirror.root}: {error}"})
        elif "start" in message:
            self._start(message["start"], message["spec"])
        elif "signal" in message:
            self._signal(message["pid"], message["signal"])
        elif "release" in message:
            with contextlib.suppress(OSError):
                self.seats[message["release"]].channel.send(b"e")
        elif "hush" in message:
            self._close_channel(self.seats[message["hush"]])
        elif "collect" in message:
            self._collect(message["limit"])
        elif "warm" in message:
            assert self.link is not None
            self.link.ask_warm(message["warm"], message["args"])
        elif "clock" in message:
            self.wire.send({"clock": message["clock"], "now": time.monotonic()})
        elif "store" in message:
            self.store = None  # the old one ends before the new one begins
            self.store = open_store(self.address)
            self.wire.send({"store": [self.store.host, self.store.port]})
        elif "open" in message:
            self._open(message["open"])

    def _open(self, request: dict[str, Any]) -> None:
        root = Path(request["folder"])
        try:
            shared = (root / TOKEN).read_text() == request["token"]
        except OSError:
            shared = False
        try:
            if shared:
                owned = self.private = Path(tempfile.mkdtemp(prefix="fsdp_testkit-host-"))
            else:
                root.mkdir(mode=0o700, parents=True)  # one that is there already is not ours
                self.owns_root = True
                owned = root
            self.held = hold(owned)  # harnesses on this host delete what nobody owns
            if not shared:
                self.mirror = Mirror(root)
                (root / TOKEN).write_text(request["token"])
                # inside the folder: the rank server deletes it, should this process be killed
                self.private = Path(tempfile.mkdtemp(prefix=STAYS, dir=root))
        except OSError as error:
            advice = "pytest's TMPDIR must name a folder that can be made on all hosts"
            self.wire.send({"failed": f"cannot make {root}: {error.strerror}; {advice}"})
            return
        self.wire.send({"rooted": True})
        here = [entry for entry in request["path"] if Path(entry or ".").exists()]
        sys.path[:] = here + [entry for entry in sys.path if entry not in here]
        self.link = ServerLink(
            request["method"],
            request["preload"],
            self.private / "server.log",
            str(owned),
            env=host_environment() | request["env"],
        )
        self.selector.register(self.link, selectors.EVENT_READ, self.link)

    def _hear_server(self) -> None:
        assert self.link is not None
        if not self.opened:
            try:
                self.link.wait_ready()
            except EnvironmentLacksError as error:
                self.wire.send({"failed": str(error)})
                raise WireError("the rank server did not start") from None
            self.opened = True
            self.wire.send({"opened": {"problems": self.link.problems, "carries": self.owns_root}})
            return
        message = self.link.next()
        if message is None:
            self.wire.send({"failed": "the rank server died"})
            raise WireError("the rank server died")
        if "started" in message:
            self.pids[message["pid"]] = self.seats[message["started"]]
        elif "ended" in message and (seat := self.pids.pop(message["ended"], None)) is not None:
            self._last_words(seat)
            message["rank"] = seat.rank
        self.wire.send({"server": message})

    def _start(self, rank: int, spec: dict[str, Any]) -> None:
        assert self.link is not None
        if (old := self.seats.pop(rank, None)) is not None:
            self._close_channel(old)
            self._close_output(old)
        logs = self.private / f"{spec['job']}-{spec['attempt']}"
        logs.mkdir(exist_ok=True)
        Path(spec["folder"]).mkdir(parents=True, exist_ok=True)
        spec["logs"] = str(logs)
        spec["path"] = [str(entry) for entry in sys.path]
        if not Path(spec["cwd"]).is_dir():
            spec["cwd"] = str(Path.cwd())
        env = host_environment() | (ONE_THREAD if spec["device"] == "cpu" else {})
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            env.setdefault(name, self.interface)
        for name, value in spec["env"].items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        spec["env"] = env
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        output = Output(logs / f"rank{rank}.log")
        seat = self.seats[rank] = _Seat(rank, ours, output, logs / f"rank{rank}.stack")
        memory = os.memfd_create("job")  # not on disk: the environment may hold secrets
        with os.fdopen(memory, "wb") as file, theirs:
            file.write(json.dumps(spec).encode())
            file.flush()
            self.link.start(rank, [theirs.fileno(), memory, output.inlet])
            output.close_inlet()
        self.selector.register(ours, selectors.EVENT_READ, seat)
        self.selector.register(output.outlet, selectors.EVENT_READ, output)

    def _signal(self, pid: int, number: int) -> None:
        assert self.link is not None
        self.link.signal(pid, number)
        if number != signal.SIGUSR1 or (seat := self.pids.get(pid)) is None:
            return
        self.wire.send({"alive": seat.rank})
        seat.dumping = True
        if is_stopped(pid):
            self.wire.send({"note": f"rank {seat.rank} was in the stopped state (SIGSTOP); continued for its stack"})
            self.link.signal(pid, signal.SIGCONT)

    def _hear_rank(self, seat: _Seat) -> bool:
        """Pass on what a rank says; return whether there may be more at once."""
        try:
            data = seat.channel.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self.wire.send({"reply": seat.rank}, data)
        else:
            self._close_channel(seat)
            self.wire.send({"cut": seat.rank})
        return bool(data)

    def _last_words(self, seat: _Seat) -> None:
        """Pass on what a rank that has ended had said: before its end is told."""
        seat.dumping = False
        while seat.channel.fileno() >= 0 and self._hear_rank(seat):
            pass
        self._close_output(seat)
        if seat.output.problem:
            self.wire.send({"note": f"rank {seat.rank} {seat.output.problem}"})
        self.wire.send({"log": seat.rank}, seat.output.tail(LOG_LIMIT).encode())

    def _close_channel(self, seat: _Seat) -> None:
        if seat.channel.fileno() >= 0:
            self.selector.unregister(seat.channel)
            seat.channel.close()

    def _close_output(self, seat: _Seat) -> None:
        if seat.output.outlet >= 0:
            if seat.output.outlet in self.selector.get_map():
                self.selector.unregister(seat.output.outlet)
            seat.output.finish()

    def _look_for_stacks(self) -> None:
        for seat in self.seats.values():
            if not seat.dumping:
                continue
            size = seat.stack.stat().st_size if seat.stack.exists() else 0
            # faulthandler writes no end mark: complete is what does not grow between two looks
            if size > 0 and size == seat.stack_size:
                seat.dumping = False
                self.wire.send({"stack": seat.rank}, tail(seat.stack, LOG_LIMIT).encode())
            seat.stack_size = size

    def _collect(self, limit: int) -> None:
        problem = ""
        if self.mirror is not None:
            try:
                self.mirror.send_changes(self.wire.send, limit)
            except TooLargeError as error:
                problem = str(error)
        self.wire.send({"collected": problem})
