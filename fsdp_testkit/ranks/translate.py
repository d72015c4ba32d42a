"""What one machine says in its own terms, in those of another: environment, numbers of ranks, clocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fsdp_testkit.ranks.link import Place


def host_spec(
    spec: dict[str, Any], places: Sequence[Place], place: Place, difference: float, env: Mapping[str, str]
) -> None:
    """Change what a rank is told (see `spec.rank_spec`) into what holds on its host.

    Args:
        spec: changed in place. ``env`` becomes what the job and this session change in the environment, ``None`` for
            what they remove: the rest is the host's own.
        places: of all ranks.
        place: of this rank.
        difference: the host's clock minus this machine's, in seconds.
        env: the environment that the session began with.
    """
    now = spec["env"]
    changes: dict[str, Any] = {name: value for name, value in now.items() if env.get(name) != value}
    changes |= dict.fromkeys(name for name in env if name not in now)
    changes.pop("GLOO_SOCKET_IFNAME", None)  # this machine's
    changes["WORLD_SIZE"] = str(spec["world_size"])
    changes["LOCAL_WORLD_SIZE"] = str(place.local_world_size)
    changes.update(spec["job_env"])
    spec["env"] = changes
    spec["local_ranks"] = [other.local_rank for other in places]
    spec["deadline"] += difference


def our_reply(line: bytes, difference: float) -> bytes:
    """Return a reply with its time on this machine's clock; what is no reply is left as it is, for `Run` to judge."""
    try:
        reply = json.loads(line)
        reply["at"] -= difference
    except (ValueError, TypeError, KeyError):
        return line
    return json.dumps(reply).encode()
