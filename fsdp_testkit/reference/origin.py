"""A checkpoint folder as a rank sees it: with its own eyes, or told by the rank that reads for it."""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.reference import dcp
from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.files import Checkpoint
from fsdp_testkit.reference.places import Places
from fsdp_testkit.reference.ranks import Ranks
from fsdp_testkit.reference.routes import Route
from fsdp_testkit.reference.stream import Item
from fsdp_testkit.reference.weights import GroupReader, WeightMap, match

#: the small files that every rank needs
SMALL = ("config.json", "generation_config.json")


@dataclass(slots=True)
class Origin:
    """Where weights come from.

    Attributes:
        folder: the checkpoint's name, for errors.
        small: the folder in which `SMALL` can be read by this process.
        saved: the tensors; without data on a rank that does not read.
        digest: a number that is the same for the same headers and config; ``None`` on a rank that does not read.
    """

    folder: Path
    small: Path
    saved: Checkpoint | dcp.DcpCheckpoint
    digest: int | None

    @classmethod
    def open(cls, folder: Path) -> Origin:
        """Open a folder: headers only.

        Raises:
            LoadError: it is none, or its files are damaged.
        """
        if not folder.is_dir():
            raise LoadError(f"checkpoint={str(folder)!r} is not a folder")
        if not any(folder.iterdir()):
            raise LoadError(f"checkpoint={str(folder)!r} is an empty folder")
        if not (folder / "config.json").is_file():
            raise LoadError(f"{folder} holds no config.json")
        saved: Checkpoint | dcp.DcpCheckpoint = dcp.DcpCheckpoint(folder) if dcp.is_dcp(folder) else Checkpoint(folder)
        return cls(folder, folder, saved, zlib.crc32((folder / "config.json").read_bytes(), saved.digest))

    def fit(self, model: Any) -> tuple[WeightMap | None, set[str], list[str]]:
        """Return (how keys make tensors; names of the tensors that are given; what does not fit the meta model)."""
        if isinstance(self.saved, dcp.DcpCheckpoint):
            return None, self.saved.names.intersection(model.state_dict()), self.saved.compare(model)
        weights = match(self.saved, model)
        return weights, {name for group in weights.groups for name in group.targets}, weights.problems

    def items(self, weights: WeightMap | None, model: Any, places: Places, route: Route) -> Iterator[Item]:
        """Yield what is to be filled, in the same order on all ranks."""
        if weights is None:
            assert isinstance(self.saved, dcp.DcpCheckpoint)
            reader = _DcpReader(self.saved, places, whole=route.whole)
            for name in sorted(self.saved.names.intersection(model.state_dict())):
                yield Item(name, self.saved.dtypes[name], reader)
            return
        assert isinstance(self.saved, Checkpoint)
        for group in weights.groups:
            converted = GroupReader(group, self.saved, model)
            for name in group.targets:
                yield Item(name, group.dtypes[name], converted, group.strategy == "plain")


@contextlib.contextmanager
def told(folder: Path, ranks: Ranks, route: Route) -> Iterator[Origin]:
    """Open the folder on the ranks that read, which tell the others what they need to know. Collective.

    Raises:
        LoadError: see `Origin.open`.
    """
    own: Origin | None = None
    message: Any = None
    with ranks.phase(votes=True) as vote:
        if route.reads:
            own = Origin.open(folder)
            vote.same = own.digest
            small = {name: (folder / name).read_bytes() for name in SMALL if (folder / name).is_file()}
            message = (small, isinstance(own.saved, dcp.DcpCheckpoint), own.saved.table())
    small, is_dcp, table = ranks.gather(message)[route.source]
    with contextlib.ExitStack() as stack:
        with ranks.phase():
            if own is None:
                temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                for name, data in small.items():
                    (temporary / name).write_bytes(data)
                kind = dcp.DcpCheckpoint if is_dcp else Checkpoint
                own = Origin(folder, temporary, kind.described(folder, table), None)
        yield own


class _DcpReader:
    """Parts of a DCP folder's tensors: each read whole when its turn comes, or, once read, this rank's own."""

    def __init__(self, saved: dcp.DcpCheckpoint, places: Places, *, whole: bool) -> None:
        self.saved = saved
        self.places = places
        self.whole = whole
        self._name = ""
        self._value = torch.empty(0)

    def part(self, target: str, start: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Return rows of ``target``."""
        if not self.whole:
            return self.places.window(target)[0]
        if self._name != target:
            self._value = torch.empty(self.saved.shapes[target], dtype=self.saved.dtypes[target])
            self.saved.read({target: self._value})
            self._name = target
        return self._value[start : start + shape[0]] if shape else self._value

    def read_into(self, out: torch.Tensor, target: str, start: int) -> None:
        """Fill ``out`` with rows of ``target``."""
        out.copy_(self.part(target, start, out.shape))
