"""How much slower than usual this machine is at the moment: deadlines are scaled by it.

A trivial job with a fixed amount of work is run; what it takes, over what it takes on an idle machine, is the
factor. Only a rank can measure it: the parent sleeps most of the time and is served at once by a busy scheduler.
"""

from __future__ import annotations

import time
from typing import Any

#: Seconds that the work takes on one idle core of an ordinary server.
REFERENCE = 0.06
#: A machine that is slower than this by load or by nature does not wait any longer: a hang has to be reported.
LARGEST = 5.0
#: Seconds that a measurement holds.
VALID = 120.0
#: Seconds for the trivial job; one that takes longer says enough.
LIMIT = 10.0
TARGET = "fsdp_testkit.ranks.load:trivial"


def trivial(context: Any) -> float:
    """Do the work on a rank; return the seconds it took."""
    context.observe()
    begun = time.monotonic()
    total = 0
    for number in range(2_000_000):
        total += number & 7
    return time.monotonic() - begun


def factor(seconds: float | None) -> float:
    """Return what deadlines are multiplied by, from the cost of the trivial job; ``None`` where it did not end.

    It is never below 1, so a fast machine gets no shorter deadline than was asked for.
    """
    return LARGEST if seconds is None else min(LARGEST, max(1.0, seconds / REFERENCE))


def remark(deadline: float, scale: float, seconds: float | None) -> str:
    """Return what a report of a hang says of a deadline that was scaled."""
    cost = f"took {seconds:.2f} s" if seconds is not None else f"did not end within {LIMIT:g} s"
    return (
        f"the deadline of {deadline:g} s was multiplied by {scale:.1f}: a trivial job {cost}, "
        f"{REFERENCE:g} s is usual on an idle machine"
    )
