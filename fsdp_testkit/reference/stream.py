"""From files to the ranks' places: own slices are read, other ranks' are sent to them, tensor by tensor.

Where ranks read for others, work goes in batches of few tensors, each in three steps. All ranks *prepare*: memory is
taken, slices are read and converted, which is where things go wrong. Then they *agree*: if anything did, all stop
here, before a message is sent that nobody takes. Then slices are *sent*, in the file's dtype if that is the smaller
one, and straight from the file's map where they lie there. A source so holds its own shard and one batch, at most the
largest tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.places import Places
from fsdp_testkit.reference.progress import Progress
from fsdp_testkit.reference.ranks import Ranks
from fsdp_testkit.reference.routes import Route

#: bytes of a batch, unless a single tensor is larger (or the largest smaller)
BATCH = 32 * 2**20


class Reader(Protocol):
    """Reads parts of tensors in the file's dtype."""

    def part(self, target: str, start: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Return rows of ``target`` from ``start`` on; may be a view of something shared."""
        ...

    def read_into(self, out: torch.Tensor, target: str, start: int) -> None:
        """Fill ``out`` with the same rows."""
        ...


@dataclass(slots=True)
class Item:
    """One tensor of the model that a file gives.

    Attributes:
        name: of the parameter or buffer.
        dtype: of the file.
        reader: shared by the items that one conversion makes.
        view: whether parts come as private views of the file's map.
    """

    name: str
    dtype: torch.dtype
    reader: Reader
    view: bool = False


class Filler:
    """Fills this rank's places, and those of the ranks that it reads for."""

    def __init__(self, places: Places, ranks: Ranks, route: Route, progress: Progress, *, zero_copy: bool) -> None:
        self.places = places
        self.ranks = ranks
        self.route = route
        self.progress = progress
        self.zero_copy = zero_copy
        self._filled: dict[int, str] = {}

    def fill(self, items: Iterator[Item]) -> None:
        """Fill from each item in turn; alone where every rank reads for itself, else collectively.

        Raises:
            LoadError: two names of a tied parameter have different values.
            ReferenceLoaderError: what any rank met, where ranks read for each other.
        """
        if self.route.quiet:
            for item in items:
                self._read(item)
                self.progress.add(self.places.nbytes(item.name))
            return
        late: BaseException | None = None
        for batch in self._batches(deque(items)):
            jobs: list[_Transfer] = []
            with self.ranks.phase():
                if late is not None:
                    raise late
                jobs = [self._prepare(item) for item in batch]
            self._exchange(jobs)
            try:
                while jobs:  # what has arrived is not held while the next batch is made
                    self._take(jobs.pop(0))
            except Exception as error:  # told to all by the next phase
                late = error
            self.progress.add(sum(self.places.nbytes(item.name) for item in batch))
        self.ranks.agree(late)

    def _read(self, item: Item) -> None:
        again = self._again(item)
        if again is None and self.zero_copy and item.view and self.places.can_adopt(item.name, item.dtype):
            # the file's own pages, copied by the system when they are written to
            start, shape = self.places.part_of(item.name, self.places.shard)
            self.places.adopt(item.name, item.reader.part(item.name, start, shape))
            return
        out, start = self.places.window(item.name)
        if again is not None:
            out = torch.empty_like(out)
        item.reader.read_into(out, item.name, start)
        self._compare(item, again, out)

    def _again(self, item: Item) -> str | None:
        """Return the other name under which this tensor has been filled already; note the first."""
        first = self._filled.setdefault(id(self.places.tensors[item.name]), item.name)
        return None if first == item.name else first

    def _compare(self, item: Item, again: str | None, value: torch.Tensor) -> None:
        # both names of a tied parameter are in the file: right only if they agree
        if again is not None and not torch.equal(value, self.places.window(again)[0]):
            raise LoadError(f"{item.name!r} and {again!r} are tied, but the file holds different values for them")

    def _batches(self, items: deque[Item]) -> Iterator[list[Item]]:
        """Take ``items`` out in batches: a reader, and what it has converted, goes with its last item."""
        sizes = [self.places.whole_nbytes(item.name) for item in items]
        limit = min(BATCH, max(sizes, default=0))
        batch: list[Item] = []
        held = 0
        for size in sizes:
            if batch and held + size > limit:
                yield batch
                batch, held = [], 0
            batch.append(items.popleft())
            held += size
        if batch:
            yield batch

    def _prepare(self, item: Item) -> _Transfer:
        places, name = self.places, item.name
        again = self._again(item)
        out, _ = places.window(name)
        if again is not None:
            out = torch.empty_like(out)
        wire = item.dtype if item.dtype.itemsize <= out.dtype.itemsize else out.dtype
        device = torch.device(self.ranks.mesh.device_type)
        if not self.route.reads:
            direct = out.dtype == wire and out.device.type == device.type
            stage = out if direct else torch.empty(out.shape, dtype=wire, device=device)
            return _Transfer(item, again, out, stage, [])
        parts: dict[int, torch.Tensor] = {}
        own = places.shard
        for shard in {own, *(shard for _, shard in self.route.serves)}:
            start, shape = places.part_of(name, shard)
            if places.is_sharded(name) or not parts:
                parts[shard] = item.reader.part(name, start, shape).to(device=device, dtype=wire).contiguous()
            else:
                parts[shard] = next(iter(parts.values()))
        sends = [(rank, parts[shard]) for rank, shard in self.route.serves]
        return _Transfer(item, again, out, parts[own], sends)

    def _exchange(self, jobs: list[_Transfer]) -> None:
        operations = []
        for job in jobs:
            if not self.route.reads and job.stage.numel():
                operations.append(dist.P2POp(dist.irecv, job.stage, self.route.source))
            operations += [dist.P2POp(dist.isend, part, rank) for rank, part in job.sends if part.numel()]
        if not operations:
            return
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        except RuntimeError as error:
            raise LoadError(f"rank {self.ranks.rank} lost the connection to another rank: {error}") from error

    def _take(self, job: _Transfer) -> None:
        if job.stage is not job.out and job.out.numel():
            job.out.copy_(job.stage)
        self._compare(job.item, job.again, job.out)


@dataclass(slots=True)
class _Transfer:
    """One item on its way: where it ends, what comes in (or is read), and what goes out."""

    item: Item
    again: str | None
    out: torch.Tensor
    stage: torch.Tensor
    sends: list[tuple[int, torch.Tensor]]
