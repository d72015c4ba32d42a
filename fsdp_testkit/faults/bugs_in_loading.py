"""Museum: bugs of meta init, ties, buffers, dtypes, shapes, units and memory: what a load leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.case import Case
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Sharding, locals_of

MOE = "qwen3_moe"
TIED = "gemma"  # tied by default, with rotary buffers
ROUTED = "glm_moe_dsa"  # a router bias that is a persistent buffer


class _Buffers(Fault):
    """Writes ``value`` into the buffers that `chosen` names, on the ranks from ``first`` on."""

    value: ClassVar[float] = 0.0
    first: ClassVar[int] = 0
    persistent: ClassVar[bool] = False
    test = "buffers_dtypes"
    variant = "default"
    checks = ("buffers",)
    causes = ("buffer not filled",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Overwrite the buffers."""
        saved = model.state_dict(keep_vars=True).keys()
        for name, buffer in model.named_buffers():
            if (name in saved) == self.persistent and self.rank >= self.first and buffer.is_floating_point():
                buffer.fill_(self.value)
                self.hit()
        return model


class GarbageOnOtherRanks(_Buffers, bug="rope-buffer-garbage-on-nonzero-ranks"):
    """Only what a state dict lists is sent to the other ranks."""

    story = "buffers outside the state dict keep uninitialised memory on all ranks but the first"
    value = float("nan")
    first = 1
    blamed = 1


class LostOnRank0Too(_Buffers, bug="rope-buffer-wrong-init-on-rank0"):
    """Materialising reallocates the buffers, and nothing restores them on any rank."""

    story = "all ranks agree on rotary frequencies of zero"
    blamed = 0


class StrictLoadWithoutBuffers(_Buffers, bug="meta-to-empty-buffer-loss"):
    """A strict load reports that all keys match, and the buffers hold garbage."""

    story = "a state dict without non-persistent buffers fits strictly and leaves them as they were allocated"
    test = "meta_init"
    value = 1e30


class PersistentSkipped(_Buffers, bug="buffer-has-no-device-mesh"):
    """Entries of the state dict that are no sharded tensors are passed over (the silent variant)."""

    story = "the broadcast skips plain tensors, so that persistent buffers stay empty off rank 0"
    model = ROUTED
    persistent = True
    value = 7.0
    first = 1
    blamed = 1


class BufferAsParameter(Fault, bug="buffer-loaded-as-parameter"):
    """A persistent buffer comes back as a parameter."""

    story = "placeholders are made for each name of the file, and all of them as parameters"
    model = ROUTED
    test = "buffers_dtypes"
    variant = "default"
    checks = ("buffers",)
    causes = ("trained set changed",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Register the buffers of the state dict as frozen parameters."""
        saved = model.state_dict(keep_vars=True).keys()
        for name, buffer in list(model.named_buffers()):
            if name in saved:
                owner, _, own = name.rpartition(".")
                module = model.get_submodule(owner)
                delattr(module, own)
                module.register_parameter(own, nn.Parameter(buffer, requires_grad=False))
                self.hit()
        return model


class Placeholders(Fault, bug="nan-placeholders-on-nonzero-ranks"):
    """Off rank 0 one placeholder is taken for loaded."""

    story = "a tensor left out of the broadcast keeps NaN placeholders on all ranks but the first"
    checks = ("initial_weights",)
    causes = ("weight not loaded",)
    blamed = 1

    def after_load(self, model: nn.Module) -> nn.Module:
        """Write NaN into one shard."""
        if self.rank:
            next(part for _, part in locals_of(model, "o_proj")).fill_(float("nan"))
            self.hit()
        return model


class InitAfterLoad(Fault, bug="loaded-then-random"):
    """Weights are initialised once more after they were loaded."""

    story = "the files are read right, then an init function runs over the result"
    checks = ("initial_weights",)
    causes = ("weight not loaded",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Draw all matrices again."""
        for _, part in locals_of(model):
            if part.ndim > 1:
                part.normal_(std=0.02)
                self.hit()
        return model


class NothingLoaded(Fault, bug="weights-path-forgotten"):
    """No weights are read: the model trains from zeros."""

    story = "the path of the weights is not passed on, and the empty model goes into training"
    checks = ("initial_weights",)
    causes = ("weight not loaded",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Zero everything."""
        for _, part in locals_of(model):
            part.zero_()
            self.hit()
        return model


class EmptiedAfterBroadcast(Fault, bug="sync-module-states-random-accuracy"):
    """On the ranks that received the weights, memory is allocated once more afterwards."""

    story = "materialising comes after the broadcast and throws its result away"
    checks = ("initial_weights",)
    causes = ("weight not loaded",)
    blamed = 1

    def after_load(self, model: nn.Module) -> nn.Module:
        """Fill every shard of the receiving ranks with poison."""
        if self.rank:
            for _, part in locals_of(model):
                part.copy_(torch.full_like(part, float("nan")))
                self.hit()
        return model


class ExpertsOfRank0(Fault, bug="ep-experts-overwritten-by-rank0-broadcast"):
    """Rank 0's experts are sent to all ranks."""

    story = "a broadcast that expects the same tensor everywhere overwrites each rank's own experts"
    model = MOE
    checks = ("initial_weights",)
    causes = ("wrong slice",)
    blamed = 1

    def after_load(self, model: nn.Module) -> nn.Module:
        """Broadcast the local experts, as many as the receiver has."""
        for name, parameter in model.named_parameters():
            if "experts" not in name or not isinstance(parameter, DTensor):
                continue
            part = parameter.to_local().detach()
            rows = -(-parameter.shape[0] // self.world_size)
            sent = part.clone() if self.rank == 0 else part.new_empty((rows, *part.shape[1:]))
            dist.broadcast(sent, 0)
            if self.rank:
                part.copy_(sent[: part.shape[0]])
                self.hit()
        return model


class ExpertKeysSkipped(Fault, bug="v5-layout-meta-init-mismatch"):
    """The file's keys for single experts match no fused parameter and are passed over."""

    story = "a loader of its own knows no conversion from single experts to the fused layout"
    model = MOE
    checks = ("initial_weights",)
    causes = ("weight not loaded",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Leave the fused weights as they were allocated."""
        for _, part in locals_of(model, "experts"):
            part.fill_(float("nan"))
            self.hit()
        return model


class NotUpcast(Fault, bug="fp32-upcast-is-noop"):
    """A warning says fp32, the parameters stay bf16."""

    story = "the result of the upcast is bound to a local name and forgotten"
    test = "buffers_dtypes"
    variant = "default"
    checks = ("dtypes",)
    causes = ("wrong dtype",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load in bf16 where fp32 was asked for."""
        if arguments["dtype"] != torch.float32:
            return arguments
        self.hit()
        return arguments | {"dtype": torch.bfloat16}


class TwoDtypesInAUnit(Sharding, bug="mixed-dtype-group-asserts"):
    """One unit holds trained parameters of two dtypes."""

    story = "a weight of another dtype lands in a block's unit, which FSDP2 refuses at the first forward"
    checks = ("ranks",)
    causes = ("wrong dtype",)
    says = "dtype"

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Cast one parameter before a block is sharded."""
        if not isinstance(module, list) and hasattr(module, "input_layernorm"):
            norm = module.input_layernorm
            norm.weight = nn.Parameter(norm.weight.detach().bfloat16())
            self.hit()
        return original(module, **arguments)


class GlobalFromLocal(Fault, bug="size-inferred-from-local-shard"):
    """Global shapes are inferred as local rows times ranks."""

    story = "sharded tensors are made without their global shape, which is wrong where rows do not divide"
    test = "sharding_structure"
    checks = ("structure",)
    causes = ("padded rows lost",)

    @contextlib.contextmanager
    def arm(self, *, rank: int, world_size: int, case: Case) -> Iterator[None]:
        """Drop the shape that callers pass on."""
        original = DTensor.from_local

        def inferring(*positional: Any, **named: Any) -> Any:
            if named.pop("shape", None) is not None:
                named.pop("stride", None)
                self.hit()
            return original(*positional, **named)

        DTensor.from_local = staticmethod(inferring)
        try:
            with super().arm(rank=rank, world_size=world_size, case=case):
                yield
        finally:
            DTensor.from_local = staticmethod(original)
