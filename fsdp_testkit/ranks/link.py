"""The parent's end of the rank server and of the store that the ranks meet at."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.ranks.server import MESSAGE_LIMIT
from fsdp_testkit.ranks.spec import ONE_THREAD

#: Seconds for the server to import what it preloads. Long: a cold disk and a loaded machine are no failure.
START_LIMIT = 180.0
#: Seconds for the server to end its ranks and itself.
STOP_LIMIT = 3.0
_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from fsdp_testkit.ranks.server import main
main(%s)"""


class Store(NamedTuple):
    """A store that the ranks of jobs meet at; it ends with the last reference to its handle, or with who holds it."""

    handle: Any
    host: str
    port: int


class Place(NamedTuple):
    """Where a rank runs: name of its host, ``""`` for this machine, and its number among the ranks there."""

    host: str
    local_rank: int
    local_world_size: int


class Link(Protocol):
    """What starts the ranks of a harness: a rank server on this machine, or those of other machines."""

    problems: list[str]

    def fileno(self) -> int:
        """Return what becomes readable when there is something to receive."""
        ...

    def wait_ready(self) -> bool:
        """Wait until ranks can be started; raise `EnvironmentLacksError` where they cannot.

        Returns:
            Whether it was connected anew: a store that was opened before may have gone with the old connection.
        """
        ...

    def place(self, ranks: int, together: int) -> list[Place]:
        """Say where the ranks of the next job will run, and prepare it; raise `UsageError` where they do not fit."""
        ...

    def open_store(self) -> Store:
        """Open a store that all ranks reach."""
        ...

    def start(self, rank: int, files: Sequence[int]) -> None:
        """Ask for a rank; ``files`` are its channel, the job and its log."""
        ...

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a rank."""
        ...

    def receive(self) -> list[dict[str, Any]] | None:
        """Return what has come in, ``None`` where all is lost."""
        ...

    def collect(self) -> dict[str, str]:
        """Bring the files of the last job here; return what went wrong, by name of the host."""
        ...

    def silent(self, rank: int) -> str:
        """Return why nothing may be known of a rank that was asked for its stack, ``""`` where its host answers."""
        ...

    def warm(self, target: str, args: dict[str, Any], limit: float) -> str | None:
        """Run a function where ranks are forked from; return what went wrong, ``None`` where no answer came."""
        ...

    def close(self, *, at_once: bool = False) -> None:
        """End all ranks and what starts them."""
        ...


class ServerLink:
    """A running rank server on this machine; see `Link`.

    Args:
        method: ``fork`` or ``spawn``.
        preload: modules that the server imports.
        log: file for what the server prints.
        folder: deleted by the server should the parent die; ``""`` for none.
        env: of the server; this process's where ``None``.
    """

    def __init__(
        self, method: str, preload: Sequence[str], log: Path, folder: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.problems: list[str] = []
        self._ready = False
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        boot = _BOOT % f"{theirs.fileno()}, {method!r}, {list(preload)!r}, {folder!r}"
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", boot, json.dumps([str(entry) for entry in sys.path])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env={**(os.environ if env is None else env), **ONE_THREAD},
                start_new_session=True,  # Ctrl-C at the terminal reaches the parent only
            )

    def wait_ready(self) -> bool:
        """Wait until ranks can be started; the store is not the server's, so that it stays.

        Raises:
            EnvironmentLacksError: the server ended or did not come up in time.
        """
        if self._ready:
            return False
        self.socket.settimeout(START_LIMIT)
        try:
            message = self.next()
        except TimeoutError:
            message = None
        self.socket.setblocking(True)
        if message is None:
            self.close()
            output = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise EnvironmentLacksError(f"the rank server did not start; it printed:\n{output}")
        self.problems = list(message["problems"])
        self._ready = True
        return False

    def fileno(self) -> int:
        """Return the socket's; see `Link`."""
        return self.socket.fileno()

    def place(self, ranks: int, together: int) -> list[Place]:
        """All of them run here."""
        return [Place("", rank, ranks) for rank in range(ranks)]

    def open_store(self) -> Store:
        """Open a store in this process."""
        return open_store()

    def collect(self) -> dict[str, str]:
        """Return nothing: files are here already."""
        return {}

    def silent(self, rank: int) -> str:
        """Return nothing: there is no network between."""
        return ""

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the next message, ``None`` where the server is gone."""
        return None if (message := self.next()) is None else [message]

    def next(self) -> dict[str, Any] | None:
        """Return the next message, ``None`` where the server is gone."""
        try:
            data = self.socket.recv(MESSAGE_LIMIT)
        except ConnectionError:
            return None
        message: dict[str, Any] | None = json.loads(data) if data else None
        return message

    def warm(self, target: str, args: dict[str, Any], limit: float) -> str | None:
        """Have the server run a function; return what went wrong, ``None`` where no answer came in time."""
        self.socket.settimeout(limit)
        try:
            self.ask_warm(target, args)
            while (message := self.next()) is not None:
                if "warmed" in message:  # a rank of the last job may still be reported as ended before it
                    return str(message["warmed"])
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.socket.setblocking(True)
        return None

    def ask_warm(self, target: str, args: dict[str, Any]) -> None:
        """Have the server run a function; it answers with ``warmed``."""
        self.socket.send(json.dumps({"warm": target, "args": args}).encode())

    def start(self, rank: int, files: Sequence[int]) -> None:
        """Ask for a rank; ``files`` are its channel, the job and its log."""
        with contextlib.suppress(ConnectionError):  # a lost server is noticed when reading
            socket.send_fds(self.socket, [json.dumps({"start": rank}).encode()], list(files))

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a rank, if it has not been reaped."""
        with contextlib.suppress(ConnectionError):
            self.socket.send(json.dumps({"signal": number, "pid": pid}).encode())

    def close(self, *, at_once: bool = False) -> None:
        """End the server and with it all its ranks; ``at_once`` for one that does not answer."""
        with self.socket, contextlib.suppress(OSError):
            self.socket.send(b'{"bye": true}')  # without it the server takes the parent for dead
        try:
            if at_once:
                self.process.kill()
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the kernel then kills its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_LIMIT)


def open_store(address: str = "127.0.0.1") -> Store:
    """Start a store that ranks meet at, on a port chosen by the system.

    Args:
        address: IPv4 address that it listens on, loopback unless there is more than one machine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a caller that turns warnings into errors does not mean torch's import
        import torch.distributed as dist
    # The harness binds the socket itself: torch would listen on all interfaces.
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return Store(store, address, port)


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by SIGSTOP or the like."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in ("T", "t")
