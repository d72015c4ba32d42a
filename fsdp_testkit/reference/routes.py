"""Which rank reads for which: the source of every rank's slices.

Two questions are answered apart. *Where do slices come from* (``source``): each rank's own reading, or one rank that
reads for others. *One of what* (``scope``): of all ranks, of each node, or of each replica; under HSDP there are
several replicas of the weights, and "rank 0" alone does not say whose.

================ =========================================== ==========================================
scope            source="slices": a slice is read by         source="rank0": everything is read by
================ =========================================== ==========================================
``replica``      every rank that holds it (once a replica)   the first rank of each replica
``node``         one of its holders on each node             the first rank of the mesh on each node
``global``       one of its holders (replica 0)              the first rank of the mesh
================ =========================================== ==========================================
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.ranks import Ranks

SOURCES = ("auto", "slices", "rank0")
SCOPES = ("replica", "node", "global")


@dataclass(frozen=True, slots=True)
class Route:
    """Where this rank's slices come from, and whom it reads for.

    Attributes:
        rank: this global rank.
        source: the global rank that reads for it; itself where it reads its own.
        serves: (global rank, shard number) of the others that it reads for.
        whole: whether sources read for ranks of any shard, rather than for holders of the same one.
        quiet: whether no rank of the mesh reads for another.
    """

    rank: int
    source: int
    serves: tuple[tuple[int, int], ...]
    whole: bool
    quiet: bool

    @property
    def reads(self) -> bool:
        """Whether this rank opens files."""
        return self.source == self.rank


def sources(grid: list[list[int]], source: str, scope: str, nodes: dict[int, Any]) -> dict[int, int]:
    """Return global rank -> the rank that reads for it.

    Args:
        grid: global ranks by replica and shard; one row for a mesh of one axis.
        source: ``slices`` or ``rank0``.
        scope: one of `SCOPES`.
        nodes: global rank -> name of its node, only looked at where the scope is ``node``.
    """
    found: dict[int, int] = {}
    first: dict[Any, int] = {}
    for replica, row in enumerate(grid):
        for shard, rank in enumerate(row):
            part = {"replica": replica, "node": nodes.get(rank), "global": None}[scope]
            key = (part, shard if source == "slices" else None)
            found[rank] = first.setdefault(key, rank)
    return found


def check(source: Any, scope: Any) -> None:
    """Validate both arguments.

    Raises:
        LoadError: one of them is not known.
    """
    for name, value, known in (("source", source, SOURCES), ("source_scope", scope, SCOPES)):
        if value not in known:
            raise LoadError(f"{name}={value!r} must be one of {known}")


def choose(ranks: Ranks, source: str, scope: str, *, visible: bool) -> Route:
    """Return this rank's route. Collective where it has to be asked who is on which node.

    Args:
        ranks: of the mesh.
        source: one of `SOURCES`; ``auto`` is ``slices`` where every rank sees the checkpoint, else ``rank0``.
        scope: one of `SCOPES`.
        visible: whether all ranks see the checkpoint.

    Raises:
        LoadError: ``rank0`` was asked for, and the process group only claims to have other ranks.
    """
    if source == "auto":
        source = "slices" if visible or ranks.alone else "rank0"
    grid = ranks.mesh.mesh.reshape(-1, ranks.mesh.shape[-1]).tolist()
    nodes = ranks.gather(node_name()) if scope == "node" else {}
    table = sources(grid, source, scope, nodes)
    shard_of = {rank: shard for row in grid for shard, rank in enumerate(row)}
    serves = tuple((other, shard_of[other]) for other, who in table.items() if who == ranks.rank != other)
    quiet = all(rank == who for rank, who in table.items())
    if not quiet and ranks.alone:
        raise LoadError(f"source={source!r}, source_scope={scope!r} needs ranks that communicate; this group is fake")
    return Route(ranks.rank, table[ranks.rank], serves, source == "rank0", quiet)


def node_name() -> str:
    """Return what tells this machine from the others of the job."""
    return socket.gethostname()
