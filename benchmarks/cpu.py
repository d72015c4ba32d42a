"""What processes have spent. Wall time would measure what else runs on the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(children: Iterable[int] | None = None) -> float:
    """Return CPU seconds, user and system, of this process, of its children, and of all that these have waited for.

    Args:
        children: process ids; all children that live where ``None``.
    """
    if children is None:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
        children = map(int, listed.split())
    total = time.process_time()
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15]) / _TICK
    return total
