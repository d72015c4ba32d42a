"""The ranks of a mesh, and how they agree: an error of one is raised by all, so that none waits for another in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fsdp_testkit.reference import errors
from fsdp_testkit.reference.errors import LoadError, ReferenceLoaderError

#: larger than any number that ranks compare
NOTHING = 2**62


@dataclass(slots=True)
class Vote:
    """What a rank brings to the end of a phase.

    Attributes:
        same: a number below 2**62 that has to be the same on all ranks that have one.
        highest: afterwards the largest of all ranks' numbers.
    """

    same: int | None = None
    highest: int = 0


class Ranks:
    """The ranks of a device mesh of any number of axes. Every method but `alone` is collective over the mesh.

    Attributes:
        mesh: the mesh.
        rank: this process's global rank.
        alone: whether there is nobody to talk to: one rank, or a process group that only claims to have more.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.rank = int(dist.get_rank())
        # axis by axis: a group over all ranks of a 2-D mesh need not exist
        self._groups = [group for group in mesh.get_all_groups() if group.size() > 1]
        self.alone = not self._groups or dist.get_backend(self._groups[0]) == "fake"

    @contextmanager
    def phase(self, *, votes: bool = False) -> Iterator[Vote]:
        """Run a block on every rank; if it fails on any, raise on all.

        Args:
            votes: whether ranks compare anything else; the same on all of them. To reduce one number takes half the
                time that four take.

        Yields:
            What this rank wants to compare with the others; read and completed when the block has ended, if ``votes``.

        Raises:
            ReferenceLoaderError: the error of the first rank that failed, with its rank, on every rank alike.
        """
        error: BaseException | None = None
        vote = Vote()
        try:
            yield vote
        except Exception as caught:  # anything: whatever stops this rank has to stop the others
            error = caught
        self.agree(error, vote if votes else None)

    def agree(self, error: BaseException | None, vote: Vote | None = None) -> None:
        """Raise on every rank if any rank has an error, or the votes differ where they must not; see `phase`."""
        if vote is None:
            if self.most([int(error is not None)]) != [0]:
                self._raise(error)
            return
        same = (vote.same, -vote.same) if vote.same is not None else (-NOTHING, -NOTHING)
        failed, high, low, vote.highest = self.most([int(error is not None), *same, vote.highest])
        if failed:
            self._raise(error)
        if high != -low and high != -NOTHING:
            raise LoadError("the ranks do not see the same checkpoint: its headers or its config differ between them")

    def most(self, values: list[int]) -> list[int]:
        """Return the largest of each value over all ranks."""
        if self.alone:
            return values
        found = torch.tensor(values, dtype=torch.int64, device=self.mesh.device_type)
        for group in self._groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return [int(value) for value in found.tolist()]

    def gather(self, value: Any) -> dict[int, Any]:
        """Return global rank -> what each rank gave (anything that can be pickled, as ranks trust each other)."""
        found = {self.rank: value}
        if self.alone:
            return found
        for group in reversed(self._groups):
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, found, group=group)
            found = {rank: item for part in parts for rank, item in part.items()}
        return dict(sorted(found.items()))

    def _raise(self, error: BaseException | None) -> None:
        mine = None
        if error is not None:
            own = isinstance(error, ReferenceLoaderError)
            text = str(error.args[0] if own and error.args else error).split("\n  - ")[0]
            kind = type(error).__name__
            mine = (kind if own else "LoadError", text if own else f"{kind}: {text}", getattr(error, "problems", ()))
        found = self.gather(mine)
        if isinstance(error, ReferenceLoaderError) and set(found.values()) == {mine}:
            raise error
        rank, (kind, text, problems) = next((rank, item) for rank, item in found.items() if item is not None)
        text = text if self.alone else f"rank {rank}: {text}"
        raised = LoadError(text, problems) if kind == "LoadError" else getattr(errors, kind)(text)
        raise raised from error
