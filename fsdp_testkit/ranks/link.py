"""The parent's end of the rank server and of the store that the ranks meet at."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


class ServerLink:
    """A running rank server.

    Args:
        method: ``fork`` or ``spawn``.
        preload: modules that the server imports.
        log: file for what the server prints.
        folder: deleted by the server should the parent die; ``""`` for none.
    """

    def __init__(self, method: str, preload: Sequence[str], log: Path, folder: str) -> None:
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
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,  # Ctrl-C at the terminal reaches the parent only
            )

    def wait_ready(self) -> None:
        """Wait until ranks can be started.

        Raises:
            EnvironmentLacksError: the server ended or did not come up in time.
        """
        if self._ready:
            return
        self.socket.settimeout(START_LIMIT)
        try:
            message = self.receive()
        except TimeoutError:
            message = None
        self.socket.setblocking(True)
        if message is None:
            self.close()
            output = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise EnvironmentLacksError(f"the rank server did not start; it printed:\n{output}")
        self.problems = list(message["problems"])
        self._ready = True

    def receive(self) -> dict[str, Any] | None:
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
            self.socket.send(json.dumps({"warm": target, "args": args}).encode())
            while (message := self.receive()) is not None:
                if "warmed" in message:  # a rank of the last job may still be reported as ended before it
                    return str(message["warmed"])
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.socket.setblocking(True)
        return None

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


def open_store() -> tuple[Any, int]:
    """Start the store that ranks meet at, on a loopback port chosen by the system.

    Returns:
        (store, port); the store ends with its last reference.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a caller that turns warnings into errors does not mean torch's import
        import torch.distributed as dist
    # The harness binds the socket itself: torch would listen on all interfaces.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    return store, port


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by SIGSTOP or the like."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in ("T", "t")
