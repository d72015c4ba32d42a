"""How the ranks of a case are arranged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fsdp_testkit.core.errors import UsageError

KINDS = ("single", "ddp", "fsdp", "hsdp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Arrangement of ranks: ``fsdp(2)``, ``hsdp(2, 2)`` (replicate 2 x shard 2), ``ddp(2)``, ``single``.

    Attributes:
        kind: one of ``single``, ``ddp``, ``fsdp``, ``hsdp``.
        replicate: size of the replicate mesh axis (1 unless ``hsdp`` or ``ddp``).
        shard: size of the shard mesh axis (1 for ``single`` and ``ddp``).
        device: ``cpu`` or ``cuda``.
        comm: ``gloo``, ``nccl`` or ``fake`` (one process claims each rank in turn; structure only).
    """

    kind: str
    replicate: int = 1
    shard: int = 1
    device: str = "cpu"
    comm: str = "gloo"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        for name in ("replicate", "shard"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UsageError(f"{name}={size!r} must be an integer of at least 1")
        if self.kind in ("single", "ddp") and self.shard != 1:
            raise UsageError(f"shard={self.shard} must be 1 for kind={self.kind!r}")
        if self.kind in ("single", "fsdp") and self.replicate != 1:
            raise UsageError(f"replicate={self.replicate} must be 1 for kind={self.kind!r}")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device={self.device!r} must be 'cpu' or 'cuda'")
        if self.comm not in ("gloo", "nccl", "fake"):
            raise UsageError(f"comm={self.comm!r} must be 'gloo', 'nccl' or 'fake'")
        if self.comm == "nccl" and self.device != "cuda":
            raise UsageError("comm='nccl' needs device='cuda'")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.replicate * self.shard

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        """Sizes of the mesh axes: ``(shard,)``, or ``(replicate, shard)`` for HSDP."""
        return (self.replicate, self.shard) if self.kind == "hsdp" else (self.world_size,)

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes, outermost first."""
        return ("replicate", "shard") if self.kind == "hsdp" else ("shard",)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Return the mesh coordinate of ``rank`` (row-major, as ``init_device_mesh`` numbers ranks)."""
        if not 0 <= rank < self.world_size:
            raise UsageError(f"rank={rank} must be in [0, {self.world_size})")
        return divmod(rank, self.shard) if self.kind == "hsdp" else (rank,)

    def __str__(self) -> str:
        if self.kind == "single":
            name = "single"
        elif self.kind == "hsdp":
            name = f"hsdp({self.replicate}, {self.shard})"
        else:
            name = f"{self.kind}({self.world_size})"
        marks = [mark for mark in (self.device, self.comm) if mark not in ("cpu", "gloo")]
        return "@".join([name, *marks])

    @classmethod
    def parse(cls, text: str, *, device: str = "cpu", comm: str = "gloo") -> Layout:
        """Read ``fsdp(2)``, ``hsdp(2, 2)``, ``ddp(4)`` or ``single``.

        Raises:
            UsageError: ``text`` has another form.
        """
        match = re.fullmatch(r"\s*(single|ddp|fsdp|hsdp)\s*(?:\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\))?\s*", text)
        if match is None:
            raise UsageError(f"layout={text!r} must look like fsdp(2), hsdp(2, 2), ddp(2) or single")
        kind, first, second = match.groups()
        if (kind == "single") != (first is None) or (kind == "hsdp") != (second is not None):
            raise UsageError(f"layout={text!r} must look like fsdp(2), hsdp(2, 2), ddp(2) or single")
        if kind == "single":
            return cls(kind=kind, device=device, comm=comm)
        if kind == "hsdp":
            return cls(kind=kind, replicate=int(first), shard=int(second), device=device, comm=comm)
        if kind == "ddp":
            return cls(kind=kind, replicate=int(first), device=device, comm=comm)
        return cls(kind=kind, shard=int(first), device=device, comm=comm)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "replicate": self.replicate,
            "shard": self.shard,
            "device": self.device,
            "comm": self.comm,
        }
