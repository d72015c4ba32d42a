"""Where the rows of a tensor lie: on which ranks, or with an offloading hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from fsdp_testkit.reference import folders


class Holder(NamedTuple):
    """A global rank, and the rows ``[start, stop)`` that it writes or sends."""

    rank: int
    start: int
    stop: int


@dataclass(slots=True)
class Source:
    """A tensor of the model that is saved.

    Attributes:
        tensor: the parameter or buffer: plain, sharded, or on meta if it is offloaded.
        fetch: returns the value of an offloaded tensor.
    """

    tensor: torch.Tensor
    fetch: Callable[[], torch.Tensor] | None = None

    @property
    def height(self) -> int:
        """Number of rows; a tensor without dims has one."""
        return self.tensor.shape[0] if self.tensor.ndim else 1

    @property
    def by_rows(self) -> bool:
        """Whether each rank holds consecutive rows, or all: what `fully_shard` makes by default."""
        if not isinstance(self.tensor, DTensor):
            return True
        kinds = [type(placement) for placement in self.tensor.placements]
        # a strided shard is a kind of its own
        plain = all(kind in (Shard, Replicate) for kind in kinds)
        return plain and [p.dim for p in self.tensor.placements if type(p) is Shard] in ([], [0])

    @property
    def partition(self) -> Any:
        """What is equal for tensors whose rows are divided in the same way."""
        if not isinstance(self.tensor, DTensor):
            return (None, (), self.height)
        return (id(self.tensor.device_mesh), self.tensor.placements, self.height)

    def holders(self) -> list[Holder]:
        """Return who writes which rows: all rows once; replicas share those that they all hold.

        A tensor that is no `DTensor` is rank 0's.
        """
        if not isinstance(self.tensor, DTensor):
            return [Holder(0, 0, self.height)]
        ranks = self.tensor.device_mesh.mesh
        places = [tuple(place) for place in (ranks >= 0).nonzero().tolist()]
        return [self._share(int(ranks[place]), place) for place in places]

    def mine(self) -> Holder:
        """Return this rank's rows."""
        me = folders.rank()
        if not isinstance(self.tensor, DTensor):
            return Holder(me, 0, self.height if me == 0 else 0)
        place = self.tensor.device_mesh.get_coordinate()
        return Holder(me, 0, 0) if place is None else self._share(me, tuple(place))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows that this rank holds, where they are; nothing is copied unless the tensor is offloaded."""
        tensor, first = self.tensor.detach(), 0
        if self.fetch is not None:
            tensor = self.fetch()
        elif isinstance(tensor, DTensor):
            first = self._held(tuple(tensor.device_mesh.get_coordinate()))[0]
            tensor = tensor.to_local()
        if not tensor.ndim:
            tensor = tensor.reshape(1)
        return tensor[start - first : stop - first]

    def _held(self, place: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows that the rank at a place of the mesh holds."""
        assert isinstance(self.tensor, DTensor)
        for placement, size, position in zip(self.tensor.placements, self.tensor.device_mesh.shape, place, strict=True):
            if type(placement) is Shard:
                # torch.chunk's rule: equal chunks, rounded up, so that the last ones may be short or empty
                chunk = -(-self.height // size)
                return min(self.height, chunk * position), min(self.height, chunk * (position + 1))
        return 0, self.height

    def _share(self, rank: int, place: tuple[int, ...]) -> Holder:
        """Return which of the rows that a place holds are its own, among its replicas."""
        assert isinstance(self.tensor, DTensor)
        replica, replicas = 0, 1
        for placement, size, position in zip(self.tensor.placements, self.tensor.device_mesh.shape, place, strict=True):
            if type(placement) is Replicate:
                replica, replicas = replica * size + position, replicas * size
        start, stop = self._held(place)
        count = stop - start
        return Holder(rank, start + count * replica // replicas, start + count * (replica + 1) // replicas)

    def gather(self, owner: int, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Return the whole tensor on rank ``owner``, ``None`` elsewhere. Every rank of the tensor's mesh calls this.

        Args:
            owner: a global rank.
            buffer: on the owner, bytes to receive into, on `communicates_on`; at least as many as the tensor has.
        """
        tensor, me = self.tensor.detach(), folders.rank()
        if not self.by_rows:
            assert isinstance(tensor, DTensor)
            whole: torch.Tensor = tensor.to(self.communicates_on).full_tensor()
            return whole if me == owner else None
        holders = [holder for holder in self.holders() if holder.stop > holder.start]
        if {holder.rank for holder in holders} == {owner}:
            return self.rows(0, self.height).reshape(tensor.shape) if me == owner else None
        row = tensor.numel() // max(1, self.height) * tensor.element_size()
        pending = []
        for holder in holders:
            if owner == holder.rank == me:
                _bytes(buffer, holder, row).copy_(_flat(self.rows(holder.start, holder.stop)))
            elif me == owner:
                pending.append(dist.P2POp(dist.irecv, _bytes(buffer, holder, row), holder.rank))
            elif me == holder.rank:
                part = _flat(self.rows(holder.start, holder.stop)).to(self.communicates_on)
                pending.append(dist.P2POp(dist.isend, part, owner))
        for work in dist.batch_isend_irecv(pending) if pending else ():
            work.wait()
        if me != owner:
            return None
        assert buffer is not None
        return buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype).reshape(tensor.shape)

    @property
    def communicates_on(self) -> torch.device:
        """The device that the tensor's ranks communicate on."""
        if isinstance(self.tensor, DTensor) and (kind := self.tensor.device_mesh.device_type) != "cpu":
            return torch.device(kind, torch.get_device_module(kind).current_device())
        return torch.device("cpu")


def _bytes(buffer: torch.Tensor | None, holder: Holder, row: int) -> torch.Tensor:
    assert buffer is not None
    return buffer[holder.start * row : holder.stop * row]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``tensor``: groups communicate them whatever the dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
