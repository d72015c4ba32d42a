"""Faults in torch and transformers that show what two test suites see; they act without any of the kit's doors.

They re-create what transformers' own ``FSDPTesterMixin`` (5.23.0) cannot see by its construction: the same batch on
every rank, a structure that is compared with itself, checkpoints that are saved before anything was trained and read
with extra keys allowed, an optimizer that hides the scale of a gradient, errors of ranks other than 0, ranks that
wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.case import Case
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.gradients import NoReduce
from fsdp_testkit.faults.parts import Sharding, local


class Upstream(Fault):
    """A fault of the comparison.

    Class attributes beside those of `Fault`: ``weakness`` (what upstream's tests do), ``shows`` (the upstream tests
    that come near it; others are not run for this fault).
    """

    weakness: ClassVar[str] = ""
    shows: ClassVar[tuple[str, ...]] = ()

    @contextlib.contextmanager
    def arm(self, *, rank: int, world_size: int, case: Case) -> Iterator[None]:
        """Also set `attributes`, and take them back."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().arm(rank=rank, world_size=world_size, case=case))
            for owner, name, value in self.attributes():
                stack.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, value)
            yield

    def attributes(self) -> list[tuple[Any, str, Any]]:
        """Return (class, name, replacement)."""
        return []


class BlockShards(Upstream, Sharding):
    """Acts on each repeated block once it is a unit."""

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Shard, then change what is a block."""
        result = original(module, **arguments)
        if not isinstance(module, list) and "DecoderLayer" in type(module).__name__:
            self.block(module)
        return result

    def block(self, module: Any) -> None:
        """Change a unit."""
        raise NotImplementedError


class NeverReduced(BlockShards):
    """The gradients of all blocks stay each rank's own."""

    story = "no block reduces its gradients over the ranks"
    weakness = "the same batch on every rank: a missing reduction changes nothing"
    shows = ("test_fsdp2_plan_vs_ddp", "test_fsdp2_bf16_training")
    checks = ("gradients",)

    def block(self, module: Any) -> None:
        """Replace the reduction."""
        comm: Any = NoReduce(self)
        module.set_custom_reduce_scatter(comm)


class BlockLeftOut(Upstream):
    """The plan resolver passes over the first block."""

    story = "the first block is no unit: the resolver of the plan drops it"
    weakness = "the structure is compared with what the implementation's own resolver says"
    shows = ("test_fsdp2_sharding_structure", "test_fsdp2_plan_vs_ddp")
    test = "sharding_structure"
    checks = ("structure",)

    def attributes(self) -> list[tuple[Any, str, Any]]:
        """Take the block out of the expanded plan."""
        from transformers.distributed.mixin import DistributedMixin

        original = DistributedMixin._expand_parallel_plan

        def expand(model: Any, plan: Any) -> dict[str, str]:
            expanded: dict[str, str] = original(model, plan)
            if expanded.pop("model.layers.0", None) is not None:
                self.hit()
            return expanded

        return [(DistributedMixin, "_expand_parallel_plan", expand)]


class StaleCheckpoint(Upstream):
    """A distributed checkpoint holds the weights as they were loaded."""

    story = "training is not in the distributed checkpoint"
    weakness = "nothing is trained before a distributed checkpoint is saved and compared"
    shows = ("test_fsdp2_save_load_dcp", "test_fsdp2_plan_vs_ddp")
    test = "dcp"
    variant = "default"
    checks = ("reload",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Save the first values of a model, then put its own back."""
        from transformers.distributed import checkpoint

        original = checkpoint._save_model_checkpoint_distributed

        def save(model: Any, *rest: Any, **named: Any) -> None:
            trained = values(model)
            write(model, model.__dict__["_first_values"])
            self.hit()
            original(model, *rest, **named)
            write(model, trained)

        return [(original, save)]

    def attributes(self) -> list[tuple[Any, str, Any]]:
        """Remember the first values."""
        from transformers import PreTrainedModel

        original = PreTrainedModel._finalize_model_loading

        def finalize(model: Any, *rest: Any) -> Any:
            result = original(model, *rest)
            model.__dict__["_first_values"] = values(model)
            return result

        return [(PreTrainedModel, "_finalize_model_loading", staticmethod(finalize))]


def values(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of all local shards."""
    return [local(parameter.detach()).clone() for parameter in model.parameters()]


def write(model: nn.Module, held: list[torch.Tensor]) -> None:
    """Write what `values` returned."""
    for parameter, value in zip(model.parameters(), held, strict=True):
        local(parameter.detach()).copy_(value)


class ExtraKey(Upstream):
    """Saved files hold a tensor that no model has."""

    story = "a buffer of the wrapper is written into the files"
    weakness = "keys are compared in one direction, and loading passes over unexpected ones"
    shows = ("test_fsdp2_save_load", "test_fsdp2_plan_vs_ddp")
    test = "save_load"
    checks = ("files",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Add the tensor."""
        from safetensors.torch import save_file

        def save(tensors: dict[str, torch.Tensor], *rest: Any, **named: Any) -> None:
            self.hit()
            save_file({**tensors, "_wrapper.step": torch.zeros(1)}, *rest, **named)

        return [(save_file, save)]


class SteppedTwice(Upstream):
    """Each sharded gradient is twice as large when the optimizer takes it as when the norm was measured."""

    story = "gradients are unscaled once more between clipping and the step"
    weakness = "Adam divides a constant factor away: what is left shows in the last weights, and names no factor"
    shows = ("test_fsdp2_plan_vs_ddp",)
    checks = ("gradients",)

    @contextlib.contextmanager
    def arm(self, *, rank: int, world_size: int, case: Case) -> Iterator[None]:
        """Act before each step of any optimizer."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        handle = register_optimizer_step_pre_hook(self.before_step)
        try:
            with super().arm(rank=rank, world_size=world_size, case=case):
                yield
        finally:
            handle.remove()

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Scale the gradients of sharded parameters."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    local(parameter.grad).mul_(2.0)
                    self.hit()


class LastStepRaises(SteppedTwice):
    """Rank 1 fails in its second optimizer step."""

    story = "an error on rank 1 after the last collective of a short run"
    weakness = "only rank 0's traceback is kept"
    shows = ("test_fsdp2_bf16_training",)
    checks = ("ranks",)
    says = "state of rank 1 is corrupt"
    blamed = 1
    seen = 0

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Raise."""
        if isinstance(optimizer.param_groups[0]["params"][0], DTensor):
            self.seen += 1
            if self.rank == 1 and self.seen == 2:
                self.hit()
                raise RuntimeError("state of rank 1 is corrupt")


class ForwardRaises(BlockShards):
    """Rank 1 fails in the middle of a forward."""

    story = "an error on rank 1 while the other rank gathers weights"
    weakness = "the error path waits for the others in a collective"
    shows = ("test_fsdp2_bf16_training",)
    checks = ("ranks",)
    says = "image of rank 1 cannot be read"
    blamed = 1

    def block(self, module: Any) -> None:
        """Act in each training forward."""
        module.register_forward_pre_hook(self.in_training)

    def in_training(self, *_: Any) -> None:
        """Do it on rank 1."""
        if self.rank == 1 and torch.is_grad_enabled():
            self.hit()
            self.happens()

    def happens(self) -> None:
        """Raise."""
        raise RuntimeError("image of rank 1 cannot be read")


class RankAsleep(ForwardRaises):
    """Rank 1 never comes back from a call inside a forward."""

    story = "rank 1 waits for something that never comes"
    weakness = "no time limit and no look at who waits where"
    says = "rank 1 is at happens"
    deadline = 10.0

    def happens(self) -> None:
        """Sleep until the process is ended."""
        while True:
            time.sleep(1.0)


FAULTS: tuple[type[Upstream], ...] = (
    NeverReduced,
    BlockLeftOut,
    StaleCheckpoint,
    ExtraKey,
    SteppedTwice,
    LastStepRaises,
    ForwardRaises,
    RankAsleep,
)
