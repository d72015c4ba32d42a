"""An agent: the long-lived process that torchrun (or srun) starts for a rank; it waits for pytest to connect.

It imports no torch and runs no test. Each connection gets a process of its own (`session`), which holds a rank server,
from which the ranks of each job are forked: a crash in a job ends that rank and nothing else. What a job's rank may use
- cores, GPUs, memory - is what the launcher gave the agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import ipaddress
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.core.versions import KIT_VERSION
from fsdp_testkit.ranks.wire import HANDSHAKE_LIMIT, Wire, WireError, answer, reason

DEFAULT_PORT = 29600
#: Connections at a time; more are closed at once.
SESSIONS = 64
#: Seconds between looks at whether sessions have ended, and whether the launcher is still there.
POLL = 0.5
#: Exit status of a process whose connection held the agent.
ENDED = 3
_PR_SET_PDEATHSIG = 1
_SIOCGIFCONF = 0x8912
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """How an agent is reached, and what it offers.

    Attributes:
        address: to listen on, a name or an IPv4 address.
        port: of the first agent of this host; 0 for one that the system chooses.
        beyond_loopback: must be set to listen on anything but loopback.
        secret: see `wire.read_secret`.
        ranks: ranks of a job that this agent starts at most.
        name: of the host, in reports.
        local_rank: number of this agent among those that the launcher started on this host; added to the port.
        local_world_size: their number.
        until_released: end with the first connection that did nothing but hold this agent.

    Raises:
        UsageError: names the value and what it must be.
    """

    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    beyond_loopback: bool = False
    secret: bytes
    ranks: int = 1
    name: str = ""
    local_rank: int = 0
    local_world_size: int = 1
    until_released: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535 or (self.port and self.port + self.local_rank > 65535):
            raise UsageError(f"port={self.port} must be in [0, 65535], with one more for each rank of the host")
        if self.ranks < 1:
            raise UsageError(f"ranks={self.ranks} must be at least 1")
        if not self.beyond_loopback and not is_loopback(resolve(self.address)):
            raise UsageError(
                f"address={self.address!r} is not loopback: whoever reaches it and knows the secret can run code as "
                "this user. Say --beyond-loopback where that is meant"
            )


def resolve(name: str) -> str:
    """Return the IPv4 address of a host.

    Raises:
        UsageError: it has none.
    """
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"address={name!r} cannot be resolved to an IPv4 address: {error.strerror}") from None
    return str(found[0][4][0])


def address_towards(name: str) -> str:
    """Return this machine's address on the way to another one; no packet is sent.

    Raises:
        UsageError: there is no way, or it is the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((resolve(name), 9))
        except OSError as error:
            raise UsageError(f"there is no way to {name!r}: {reason(error)}") from None
        own = str(probe.getsockname()[0])
    if is_loopback(own):
        raise UsageError(f"{name!r} is this machine's loopback; name it by an address that the other machines reach")
    return own


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach an address."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str:
    """Return the network interface that holds an IPv4 address (``SIOCGIFCONF`` of netdevice(7)), ``""`` for none."""
    entry = struct.Struct("16s16x8x" if struct.calcsize("P") == 8 else "16s16x")
    buffer = bytearray(entry.size * 256)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        pointer = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        raw = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", len(buffer), ctypes.addressof(pointer)))
        length = struct.unpack("iP", raw)[0]
        del pointer
    for at in range(0, length, entry.size):
        name = bytes(buffer[at : at + 16]).split(b"\0")[0].decode()
        if socket.inet_ntoa(bytes(buffer[at + 20 : at + 24])) == address:
            return name.partition(":")[0]  # "eth0:1" is a second address of eth0
    return ""


def versions() -> dict[str, str]:
    """Return what has to be the same on all machines."""
    found = {"fsdp_testkit": KIT_VERSION, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Agent:
    """Listens from its construction on; `serve` until it is told to end.

    Raises:
        EnvironmentLacksError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, options: AgentOptions) -> None:
        self.options = options if options.name else replace(options, name=socket.gethostname())
        port = options.port + options.local_rank if options.port else 0
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((resolve(options.address), port))
        except OSError as error:
            self.listener.close()
            raise EnvironmentLacksError(f"cannot listen on {options.address}:{port}: {reason(error)}") from None
        self.listener.listen(128)
        self.address, self.port = self.listener.getsockname()
        self.children: set[int] = set()

    def serve(self, ended: Callable[[], bool] = lambda: False) -> None:
        """Accept connections until ``ended`` says so, or SIGTERM or SIGINT arrives; then end all sessions."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
        try:
            with self.listener:
                while not ended():
                    if select.select([self.listener], [], [], POLL)[0]:
                        self._accept()
                    if self._reap() and self.options.until_released:
                        return
        except SystemExit:
            return
        finally:
            for pid in self.children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            for pid in self.children:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _reap(self) -> bool:
        """Look for sessions that have ended; tell whether one of them had held this agent."""
        released = False
        for pid in list(self.children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.children.discard(pid)
                released = released or os.waitstatus_to_exitcode(status) == ENDED
        return released

    def _accept(self) -> None:
        try:
            link, (peer, _) = self.listener.accept()
        except OSError:
            return
        with link:
            if len(self.children) >= SESSIONS:
                return
            agent = os.getpid()
            pid = os.fork()
            if pid:
                self.children.add(pid)
                return
            status = 1
            try:
                # SIGTERM, so that it ends its ranks and deletes its files when this process ends
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() == agent:
                    self.listener.close()
                    status = self._session(link, peer)
            except SystemExit:
                pass
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)

    def _session(self, link: socket.socket, peer: str) -> int:
        wire = Wire(link)
        # whoever connects and sends a byte now and then holds one process, and not for long
        signal.signal(signal.SIGALRM, _leave)
        signal.alarm(int(HANDSHAKE_LIMIT))
        try:
            answer(wire, self.options.secret)
        except WireError as error:
            print(f"fsdp_testkit: a connection from {peer} was closed: {error}", file=sys.stderr)  # noqa: T201
            return 1
        finally:
            signal.alarm(0)
        try:
            wire.send({"hello": self._hello()})
            message, _ = wire.receive()
            if "hold" in message:
                wire.socket.settimeout(None)
                with contextlib.suppress(WireError):
                    wire.receive()
                return ENDED
        except WireError:
            return 1  # it only wanted to know who is here
        # only now: torch-free imports, but a stranger need not cost them
        from fsdp_testkit.ranks.session import Session

        address = link.getsockname()[0]
        Session(wire, interface_of(address), address).serve()
        return 0

    def _hello(self) -> dict[str, Any]:
        own = self.options
        first = own.port > 0 and own.local_rank == 0
        return {
            "name": own.name,
            "ranks": own.ranks,
            "versions": versions(),
            # those of the other ranks of this host: pytest is told the first one only
            "siblings": [own.port + rank for rank in range(1, own.local_world_size)] if first else [],
        }


def _leave(*_: object) -> None:
    raise SystemExit(0)
