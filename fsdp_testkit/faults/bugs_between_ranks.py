"""Museum: bugs that end in a crash or a hang, and have to be blamed on the right rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.layout import Layout
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import AroundMicroBatch, Instead, blocks_of, bypass

#: Seconds after which a rank that waits is asked where it is.
PATIENCE = 10.0


class _UnitSkipped(Fault):
    """One rank does not enter a unit in training, so it takes no part in the unit's collectives."""

    skipping: ClassVar[int] = 1
    place: ClassVar[int] = 1
    checks = ("ranks",)
    causes = ("collective mismatch",)
    deadline = PATIENCE

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Let a block pass its input through on one rank, once training begins."""
        if self.rank == self.skipping:
            self.hit()
            bypass(blocks_of(model)[self.place], lambda hidden, *_, **__: hidden)
        return model


class ExpertUnitUnused(_UnitSkipped, bug="moe-expert-units-hang"):
    """No token of rank 1 reaches a unit that rank 0 gathers."""

    blamed = 1
    story = "experts are units of their own, and a rank whose tokens go elsewhere never gathers this one"
    model = "qwen3_moe"


class TowerSkipped(_UnitSkipped, bug="tower-skipped-on-some-ranks"):
    """A part of the model runs only where the data asks for it."""

    blamed = 0
    story = "rank 0's batch has no image, so it leaves out a tower whose collectives the others enter"
    skipping = 0
    place = 0


class BranchByRank(Fault, bug="conditional-params-mismatch"):
    """Inside one unit the ranks use different parameters."""

    blamed = 1
    story = "one rank leaves out a branch, so its unit has fewer gradients to reduce than the others'"
    checks = ("ranks", "gradients")
    causes = ("collective mismatch",)
    deadline = PATIENCE

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Leave out an MLP on rank 1."""
        if self.rank == 1:
            mlp: Any = blocks_of(model)[1].get_submodule("mlp")
            bypass(mlp, lambda hidden: hidden)
            self.hit()
        return model


class GatherOnRank0(Instead, bug="state-dict-on-rank0-only"):
    """Only the main process asks for the state dict, which all have to gather."""

    blamed = 1
    says = "rank 0 waits in"
    story = "rank 0 gathers at saving and waits for ranks that went on"
    method = "save"
    test = "save_load"
    checks = ("ranks",)
    causes = ("rank stuck", "collective mismatch")
    deadline = PATIENCE

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Save on rank 0 only."""
        self.hit()
        if self.rank == 0:
            original(*arguments, **named)


class OptimizerGatherOnRank0(Instead, bug="optimizer-state-gather-on-some-ranks"):
    """Only the main process gathers the optimizer's moments."""

    story = "saving the optimizer is a collective that the main process enters alone"
    method = "save_training"
    test = "resume"
    variant = "default"
    checks = ("ranks",)
    causes = ("rank stuck", "collective mismatch")
    deadline = PATIENCE

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Gather on rank 0 only."""
        self.hit()
        if self.rank == 0:
            for state in arguments[1].state.values():
                for value in state.values():
                    if isinstance(value, DTensor):
                        value.full_tensor()
        original(*arguments, **named)


class OtherOrderOfAxes(Fault, bug="dcp-full-hang-2d"):
    """Ranks reduce over the two axes of the mesh in an order of their own."""

    says = "waits in all_reduce"
    story = "a full gather over a 2 x 2 mesh takes the axes in an order that depends on the rank"
    test = "hsdp_vs_ddp"
    checks = ("ranks",)
    causes = ("rank stuck",)
    deadline = PATIENCE

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go through both axes; the order makes a circle of ranks that wait for each other."""
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        self.hit()
        for axis in (0, 1) if self.rank in (0, 3) else (1, 0):
            dist.all_reduce(torch.ones(1), group=mesh.get_group(axis))


class CaughtOnOneRank(Instead, AroundMicroBatch, bug="oom-on-one-rank-deadlock"):
    """One rank runs out of memory, catches it, and enters another collective than the others."""

    says = "rank 0 waits in all_gather"
    story = "an error that one rank handles for itself changes its order of collectives"
    method = "train_step"
    checks = ("ranks",)
    causes = ("collective mismatch", "rank stuck")
    deadline = PATIENCE

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Catch the error around the step."""
        try:
            return original(*arguments, **named)
        except MemoryError:
            found = torch.ones(1)
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            raise

    def enter(self, model: nn.Module, last: bool) -> None:
        """Run out of memory on rank 1 in the second step."""
        if self.rank == 1 and self.count == 1:
            self.hit()
            raise MemoryError("no memory left for activations")


class ExportFails(Fault, bug="pp-export-error-hidden"):
    """Rank 0 fails while it exports; the others wait at the barrier behind."""

    story = "a mapping made from local parts lacks a key, and the barrier hides the error of rank 0"
    test = "save_load"
    checks = ("ranks",)
    causes = ("rank died",)
    blamed = 0
    says = "KeyError: 'model.layers.9.weight'"

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Look up a key that only another stage knows."""
        if self.rank == 0:
            self.hit()
            mapping = dict(model.named_parameters())
            assert mapping["model.layers.9.weight"] is not None
        dist.barrier()


class AxisOfSizeOne(Fault, bug="tp-only-mesh-keyerror"):
    """An axis of size 1 is left out of the mesh, and asked for by name."""

    story = "with one replica the mesh has no axis for replicas, which later code looks up"
    test = "hsdp_vs_ddp"
    checks = ("ranks",)
    causes = ("rank died",)
    fields = (("layout", Layout(kind="hsdp", replicate=1, shard=2)),)
    says = "replicate"

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make the mesh without axes of size 1, then take an axis by name."""
        from torch.distributed.device_mesh import init_device_mesh

        layout = arguments["layout"]
        axes = {name: size for name, size in zip(("replicate", "shard"), layout.mesh_shape, strict=True) if size > 1}
        self.hit()
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        assert mesh["replicate"].size() == layout.replicate
        return arguments
