"""Slots: jobs of several processes share the cores of one machine, so that they neither starve nor thrash.

A *broker* in one process, such as the controller of pytest-xdist, hands slots out; every other process leases as
many as its job has ranks. One lease is one connection: it ends when the connection does, so a process that dies
gives its slots back, and there is no file to clean. The name of the socket is random and belongs to no file
system, so two sessions side by side know nothing of each other.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from fsdp_testkit.core.errors import UsageError

#: Seconds that a job waits for its slots. All leases end by the deadlines of their jobs; should one not, running
#: beside it is better than not running.
PATIENCE = 900.0
_CREDENTIALS = struct.Struct("3i")


class Slots(Protocol):
    """Where a harness gets leave to start processes."""

    def lease(self, processes: int) -> AbstractContextManager[str]:
        """Wait for as many slots, hold them while the context lasts; gives ``""``, or why there are none."""
        ...


def cores() -> int:
    """Return how many cores this process may use: its affinity and the limit of its control group."""
    allowed = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, round(int(quota) / int(period))))
    return allowed


class Counter:
    """Who holds slots and who waits: first come, first served, all of a job's slots or none. No I/O.

    A job larger than the capacity runs when nobody else does.

    Args:
        capacity: number of slots.
    """

    def __init__(self, capacity: int) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise UsageError(f"capacity={capacity!r} must be an integer of at least 1")
        self.capacity = capacity
        self.held: dict[int, int] = {}
        self.queue: deque[tuple[int, int]] = deque()

    def ask(self, who: int, count: int) -> list[int]:
        """Put somebody into the queue; return who holds slots from now on."""
        self.queue.append((who, min(max(1, count), self.capacity)))
        return self._grant()

    def leave(self, who: int) -> list[int]:
        """Take back what somebody holds or waits for; return who holds slots from now on."""
        self.held.pop(who, None)
        self.queue = deque(entry for entry in self.queue if entry[0] != who)
        return self._grant()

    def _grant(self) -> list[int]:
        granted = []
        # The first in the queue is never passed by: a large job would otherwise wait for ever.
        while self.queue and sum(self.held.values()) + self.queue[0][1] <= self.capacity:
            who, count = self.queue.popleft()
            self.held[who] = count
            granted.append(who)
        return granted


class SlotBroker:
    """Hands out the slots of one session from a thread of its own; `close` ends it.

    Args:
        capacity: number of slots; the cores of this machine where ``None``.

    Attributes:
        address: what `LeasedSlots` takes, in this process or in another one of the same user.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._counter = Counter(cores() if capacity is None else capacity)
        self.capacity = self._counter.capacity
        self.address = f"fsdp_testkit-slots-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(256)
        self._listener.setblocking(False)
        self._stop, self._stopper = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="fsdp_testkit-slots", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; who waits goes on without slots."""
        if self._thread.is_alive():
            self._stopper.send(b"x")
            self._thread.join(5.0)
        self._stopper.close()

    def _serve(self) -> None:
        links: dict[int, socket.socket] = {}
        with selectors.DefaultSelector() as selector, self._listener, self._stop:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stop, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stop:
                        for link in links.values():
                            link.close()
                        return
                    if key.fileobj is self._listener:
                        if (new := self._accept()) is not None:
                            links[new.fileno()] = new
                            selector.register(new, selectors.EVENT_READ)
                        continue
                    granted = self._hear(links, key.fd, selector)
                    for who in granted:
                        with contextlib.suppress(OSError):  # its end is seen in the next round
                            links[who].send(b"1")

    def _accept(self) -> socket.socket | None:
        try:
            link, _ = self._listener.accept()
        except OSError:
            return None
        _, user, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user != os.getuid():
            link.close()
            return None
        link.setblocking(False)
        return link

    def _hear(self, links: dict[int, socket.socket], who: int, selector: selectors.BaseSelector) -> list[int]:
        try:
            data = links[who].recv(32)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if data.isdigit() and who not in self._counter.held:
            return self._counter.ask(who, int(data))
        selector.unregister(links[who])
        links.pop(who).close()
        return self._counter.leave(who)


class LeasedSlots:
    """Slots of a `SlotBroker`, in any process of the same user and machine.

    Args:
        address: the broker's.
        patience: seconds to wait for slots at most.
    """

    def __init__(self, address: str, *, patience: float = PATIENCE) -> None:
        self.address = address
        self.patience = patience

    @contextlib.contextmanager
    def lease(self, processes: int) -> Iterator[str]:
        """Hold slots; see `Slots`. Where the broker is gone or silent the job runs without, and says so."""
        problem = ""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(self.patience)
            try:
                link.connect(f"\0{self.address}")
                link.send(str(processes).encode())
                if not link.recv(1):
                    problem = "the broker of slots ended: this job ran beside others"
            except TimeoutError:
                problem = f"no slots within {self.patience:g} s: this job ran beside others"
            except OSError as error:
                problem = f"no broker of slots ({error.strerror}): this job ran beside others"
            yield problem
