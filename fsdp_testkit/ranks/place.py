"""Which rank of a job runs where: plain rules, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.ranks.link import Place


def deal(agents: Sequence[tuple[str, int]], ranks: int, together: int = 1) -> list[tuple[int, Place]]:
    """Spread the ranks of a job over the hosts.

    Ranks are dealt in blocks of ``together`` consecutive ones, which stay on one host; the blocks are spread as evenly
    as they can be, so that every job of more than one block is run across hosts. Ranks of one host are consecutive.

    Args:
        agents: name of the host and number of ranks of each agent.
        ranks: number of ranks.
        together: size of a block, such as the shard axis of HSDP.

    Returns:
        for each rank the index of the agent that starts it, and its place.

    Raises:
        UsageError: they do not fit.
    """
    if ranks % together:
        raise UsageError(f"together={together} must divide the {ranks} ranks of the job")
    room: dict[str, int] = {}
    for host, count in agents:
        room[host] = room.get(host, 0) + count
    blocks = dict.fromkeys(room, 0)
    for _ in range(ranks // together):
        fitting = [host for host in room if (blocks[host] + 1) * together <= room[host]]
        if not fitting:
            there = ", ".join(f"{host} has {count}" for host, count in room.items())
            on_one = f" in blocks of {together} that stay on one host" if together > 1 else ""
            raise UsageError(f"{ranks} ranks{on_one} do not fit: {there}")
        blocks[min(fitting, key=lambda host: blocks[host])] += 1
    places: list[tuple[int, Place]] = []
    for host in room:
        seats = [index for index, (name, count) in enumerate(agents) if name == host for _ in range(count)]
        count = blocks[host] * together
        places.extend((seats[local], Place(host, local, count)) for local in range(count))
    return places
