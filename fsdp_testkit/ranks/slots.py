"""Slots: jobs of several processes share the cores and GPUs of one machine, so that they neither starve nor thrash.

A *broker* in one process, such as the controller of pytest-xdist, hands slots out; every other process leases as
many as its job has ranks, and a GPU for each where it runs on GPUs. One lease is one connection: it ends when the
connection does, so a process that dies gives its slots back, and there is no file to clean. The name of the socket is
random and belongs to no file system, so two sessions side by side know nothing of each other.
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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fsdp_testkit.core.errors import UsageError

#: Seconds that a job waits for its slots. All leases end by the deadlines of their jobs; should one not, running
#: beside it is better than not running.
PATIENCE = 900.0
#: A number of slots that no session reaches: only GPUs are shared out.
UNLIMITED = 1 << 30
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Lease:
    """What a job may use while it runs.

    Attributes:
        problem: why it holds no slots, or ``""``.
        gpus: those that are its own, as ``CUDA_VISIBLE_DEVICES`` names them; empty where none were asked for, or where
            the broker knows of none.
    """

    problem: str = ""
    gpus: tuple[str, ...] = ()


class Slots(Protocol):
    """Where a harness gets leave to start processes."""

    def lease(self, processes: int, gpus: int = 0) -> AbstractContextManager[Lease]:
        """Wait for as many slots and GPUs, hold them while the context lasts."""
        ...


@dataclass(frozen=True, slots=True)
class _Wish:
    who: int
    slots: int
    gpus: int


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

    A job larger than the capacity runs when nobody else does, and one that has more ranks than there are GPUs gets
    all GPUs.

    Args:
        capacity: number of slots.
        gpus: their names.
    """

    def __init__(self, capacity: int, gpus: Sequence[str] = ()) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise UsageError(f"capacity={capacity!r} must be an integer of at least 1")
        self.capacity = capacity
        self.gpus = tuple(gpus)
        self.held: dict[int, int] = {}
        self.pinned: dict[int, tuple[str, ...]] = {}
        self.queue: deque[_Wish] = deque()

    def ask(self, who: int, count: int, gpus: int = 0) -> list[int]:
        """Put somebody into the queue; return who holds slots from now on, and `pinned` has their GPUs."""
        self.queue.append(_Wish(who, min(max(1, count), self.capacity), min(max(0, gpus), len(self.gpus))))
        return self._grant()

    def leave(self, who: int) -> list[int]:
        """Take back what somebody holds or waits for; return who holds slots from now on."""
        self.held.pop(who, None)
        self.pinned.pop(who, None)
        self.queue = deque(wish for wish in self.queue if wish.who != who)
        return self._grant()

    def _grant(self) -> list[int]:
        granted = []
        # The first in the queue is never passed by: a large job would otherwise wait for ever.
        while self.queue:
            wish = self.queue[0]
            taken = {name for names in self.pinned.values() for name in names}
            free = [name for name in self.gpus if name not in taken]
            if sum(self.held.values()) + wish.slots > self.capacity or wish.gpus > len(free):
                break
            self.queue.popleft()
            self.held[wish.who] = wish.slots
            self.pinned[wish.who] = tuple(free[: wish.gpus])
            granted.append(wish.who)
        return granted


class SlotBroker:
    """Hands out the slots of one session from a thread of its own; `close` ends it.

    Args:
        capacity: number of slots; the cores of this machine where ``None``.
        gpus: names of the GPUs that are shared out.

    Attributes:
        address: what `LeasedSlots` takes, in this process or in another one of the same user.
    """

    def __init__(self, capacity: int | None = None, gpus: Sequence[str] = ()) -> None:
        self._counter = Counter(cores() if capacity is None else capacity, gpus)
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
                            links[who].send(b"," + ",".join(self._counter.pinned[who]).encode())

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
            data = links[who].recv(64)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        wish = data.split()
        if len(wish) == 2 and all(part.isdigit() for part in wish) and who not in self._counter.held:
            return self._counter.ask(who, int(wish[0]), int(wish[1]))
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
    def lease(self, processes: int, gpus: int = 0) -> Iterator[Lease]:
        """Hold slots; see `Slots`. Where the broker is gone or silent the job runs without, and says so."""
        problem, names = "", ""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(self.patience)
            try:
                link.connect(f"\0{self.address}")
                link.send(f"{processes} {gpus}".encode())
                if not (answer := link.recv(65536)):
                    problem = "the broker of slots ended: this job ran beside others"
                names = answer.decode()
            except TimeoutError:
                problem = f"no slots within {self.patience:g} s: this job ran beside others"
            except OSError as error:
                problem = f"no broker of slots ({error.strerror}): this job ran beside others"
            yield Lease(problem, tuple(name for name in names.split(",") if name))
