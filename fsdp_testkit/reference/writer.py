"""All ranks write the files of one checkpoint at the same time, each what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.reference import disk, folders
from fsdp_testkit.reference.outfile import OutFile
from fsdp_testkit.reference.outputs import OutputFile, Piece, SaveGroup
from fsdp_testkit.reference.sources import Source

#: bytes of a tensor that are converted, or fetched from a device, at a time: little enough to stay in a cache
BLOCK = 4 * 2**20
#: so that each source begins aligned in the buffer it is received into
_ALIGNMENT = 64


def write(files: list[OutputFile], sources: dict[str, Source], model: Any, folder: Path, *, durable: bool) -> None:
    """Write ``files`` into ``folder``. Collective.

    Most tensors need no communication: rows of a parameter are a known stretch of a file, and so is what
    transformers' usual conversions make of them, so that each rank writes the rows it holds. For other
    conversions, and for other placements than `fully_shard`'s default, a rank collects the sources of one
    group at a time and writes what they make; the groups are dealt out by their bytes.

    Beyond what is there already, a rank needs memory for a block, or for the sources and results of one group.

    Raises:
        SaveError: a rank could not write. All ranks raise, and none is left waiting in a collective.
    """
    writer = _Writer(sources, model, folder)
    owners = _owners(files, sources)
    for number, file in enumerate(files):
        begins = number % folders.world() == folders.rank()
        writer.attempt(writer.write_own, file, [g for g in file.groups if g.name not in owners], begins)
    collected = [(file, group) for file in files for group in file.groups if group.name in owners]
    mine = [group for _, group in collected if owners[group.name] == folders.rank()]
    # before anybody sends: a rank without the memory to receive would keep the others waiting
    writer.attempt(writer.reserve, mine)
    folders.agree(writer.problem)
    for file, group in collected:
        tensors = writer.collect(group, owners[group.name])
        if owners[group.name] == folders.rank():
            writer.attempt(writer.write_whole, file, group, tensors)
        del tensors
    if durable:
        writer.attempt(writer.sync)
    folders.agree(writer.problem)


class _Writer:
    """What one rank writes. After a problem it only goes on to send, so that nobody waits for it."""

    def __init__(self, sources: dict[str, Source], model: Any, folder: Path) -> None:
        self.sources = sources
        self.model = model
        self.folder = folder
        self.problem: Exception | None = None
        self._written: set[str] = set()
        self._buffer: torch.Tensor | None = None

    def attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` unless there is a problem already; an exception becomes the problem."""
        if self.problem is None:
            try:
                function(*arguments)
            except Exception as error:
                self.problem = error

    def write_own(self, file: OutputFile, groups: list[SaveGroup], begins: bool) -> None:
        """Write what this rank's rows make, and the header if this rank begins the file."""
        with OutFile(self.folder / file.name) as out:
            if begins:
                out.begin(file.frame)
                self._written.add(file.name)
            for group in groups:
                mine = {name: self.sources[name].mine() for name in group.inputs}
                if any(holder.stop > holder.start for holder in mine.values()):
                    held = {n: (h.start, self.sources[n].rows(h.start, h.stop)) for n, h in mine.items()}
                    self._put(out, file, group.part(held, BLOCK, self.model))

    def reserve(self, groups: list[SaveGroup]) -> None:
        """Allocate what this rank needs to receive the largest of ``groups``."""
        sizes = {sum(_room(self.sources[name].tensor) for name in group.inputs): group for group in groups}
        if sizes:
            group = sizes[max(sizes)]
            device = self.sources[next(iter(group.inputs))].communicates_on
            self._buffer = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def collect(self, group: SaveGroup, owner: int) -> dict[str, torch.Tensor]:
        """Return name -> whole tensor on the owner, nothing elsewhere."""
        tensors, start = {}, 0
        for name in group.inputs:
            source = self.sources[name]
            buffer = None if self._buffer is None else self._buffer[start:]
            whole = source.gather(owner, buffer)
            start += _room(source.tensor)
            if whole is not None:
                tensors[name] = whole
        return tensors

    def write_whole(self, file: OutputFile, group: SaveGroup, tensors: dict[str, torch.Tensor]) -> None:
        """Write all that a group makes."""
        with OutFile(self.folder / file.name) as out:
            self._put(out, file, group.whole(tensors, self.model))

    def sync(self) -> None:
        """Return once all that this rank wrote is on the disk."""
        for name in sorted(self._written):
            disk.sync(self.folder / name)

    def _put(self, out: OutFile, file: OutputFile, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._written.add(file.name)
            out.put(piece.data, file.frame.starts[piece.key] + piece.offset)


def _owners(files: list[OutputFile], sources: dict[str, Source]) -> dict[str, int]:
    """Return group -> the rank that collects it, for the groups that ranks cannot write by their own rows."""
    owners: dict[str, int] = {}
    load = [0] * folders.world()
    for group in (group for file in files for group in file.groups):
        inputs = [sources[name] for name in group.inputs]
        by_rows = all(source.by_rows for source in inputs)
        alike = group.strategy == "moved" or len({source.partition for source in inputs}) == 1
        if by_rows and alike and group.strategy != "full":
            continue
        holders = {h.rank for source in inputs for h in source.holders() if h.stop > h.start} if by_rows else set()
        owner = holders.pop() if len(holders) == 1 else load.index(min(load))
        owners[group.name] = owner
        load[owner] += group.nbytes
    return owners


def _room(tensor: torch.Tensor) -> int:
    return -(-int(tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
