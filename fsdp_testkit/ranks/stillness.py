"""Whether ranks do anything at all, told by the kernel's account of them. Linux; elsewhere they always do.

A rank that waits in a gloo collective sleeps, and so do the threads that move its data once nothing arrives. One that
computes runs, one that is starved by others is runnable, one that reads a disk waits without interruption: none of
them stands still. A rank that waits for NCCL polls, and is taken to be busy: NCCL has a watchdog of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: CPU seconds that a process may spend within the time in which it is said to stand still: timers of libraries.
IDLE = 0.02
#: Seconds between two looks.
POLL = 0.25
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")


class Stillness:
    """Since when one process has stood still."""

    def __init__(self, now: float) -> None:
        self.since = now
        self._spent = 0.0

    def look(self, pid: int, now: float) -> None:
        """Look at process ``pid``; ``now`` in seconds."""
        state, spent = _account(f"/proc/{pid}/stat")
        if state != "S" or spent > self._spent + IDLE:
            self.since, self._spent = now, spent


class Watch:
    """When a whole job stands still.

    Args:
        stall: seconds for which all of its processes have to.

    Attributes:
        stall: grows with each time, so that who sleeps outside of a collective is asked less and less often.
        stood_for: seconds for which the job had stood still when `look` said so.
    """

    def __init__(self, stall: float) -> None:
        self.stall = stall
        self.stood_for = 0.0
        self._looked_at = 0.0

    def look(self, waiting: Sequence[tuple[int, Stillness]], now: float) -> bool:
        """Look at processes, at most every `POLL` seconds; tell whether they have all stood still for long enough."""
        if now < self._looked_at + POLL:
            return False
        self._looked_at = now
        for pid, still in waiting:
            still.look(pid, now)
        last = max((still.since for _, still in waiting), default=now)
        if now - last < self.stall or not all(sleeps(pid) for pid, _ in waiting):
            return False
        self.stood_for = now - last
        self.stall *= 2
        for _, still in waiting:
            still.since = now
        return True


def sleeps(pid: int) -> bool:
    """Tell whether all threads of a process sleep, in a way that a signal would end."""
    try:
        tasks = [entry.name for entry in os.scandir(f"/proc/{pid}/task")]
    except OSError:
        return False
    return bool(tasks) and all(_account(f"/proc/{pid}/task/{task}/stat")[0] == "S" for task in tasks)


def _account(path: str) -> tuple[str, float]:
    """Return the state of a process or thread and the CPU seconds it has spent; see proc(5)."""
    try:
        fields = Path(path).read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) * _TICK
