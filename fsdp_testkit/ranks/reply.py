"""What a rank's reply has to look like: a target may write anything into the channel."""

from __future__ import annotations

from typing import Any

_STATUSES = ("ok", "raised", "skipped")


def objection(reply: Any, tag: tuple[str, int, int]) -> str:
    """Say why something that came as JSON is no reply, ``""`` where it is one.

    Args:
        reply: what came.
        tag: job, rank and attempt that it has to belong to.
    """
    if not isinstance(reply, dict):
        return "is no JSON object"
    given = (reply.get("job"), reply.get("rank"), reply.get("attempt"))
    if given != tag:
        return f"belongs to (job, rank, attempt) = {given}"
    if reply.get("status") not in _STATUSES or type(reply.get("observations", 0)) is not int:
        return "has no valid status or number of observations"
    numbers = [reply.get(name) for name in ("at", "seconds", "ready")]
    texts = [reply.get(name, "") for name in ("error", "traceback")]
    if not all(isinstance(item, float | int) for item in numbers) or not all(isinstance(item, str) for item in texts):
        return "has fields of wrong types"
    return ""
