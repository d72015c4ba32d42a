"""Museum: bugs of meta init, ties, buffers, dtypes, shapes, units and memory: what a load leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.case import Case
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import bypass, local, locals_of
from fsdp_testkit.faults.weights import TieBroken

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


class TwoDtypesInAUnit(Fault, bug="mixed-dtype-group-asserts"):
    """One unit holds trained parameters of two dtypes."""

    story = "a weight of another dtype lands in a block's unit, which FSDP2 refuses at the first forward"
    checks = ("ranks",)
    causes = ("wrong dtype",)
    says = "dtype"

    def patches(self) -> list[tuple[Any, Any]]:
        """Cast one parameter before a block is sharded."""
        original = fully_shard

        def partial(module: Any, **arguments: Any) -> Any:
            if not isinstance(module, list) and hasattr(module, "input_layernorm"):
                norm = module.input_layernorm
                norm.weight = nn.Parameter(norm.weight.detach().bfloat16())
                self.hit()
            return original(module, **arguments)

        return [(fully_shard, partial)]


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


# ties


class TieSkippedAfterInit(TieBroken, bug="from-config-init-skips-tie"):
    """The model that trains has one parameter more than the config says."""

    story = "each module is initialised on its own, and the wrapper that ties again at the end is never called"
    test = "sharding_structure"
    checks = ("ties",)
    causes = ("tie lost",)


class TwoDraws(TieBroken, bug="tie-lost-meta-modalities"):
    """Head and embedding are initialised one after the other."""

    story = "the tie of the constructor does not outlive materialising; the two names get values of their own"
    checks = ("gradients", "losses")
    causes = ("tie lost",)
    also = (("sharding_structure", "tied", "ties"),)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Draw the head anew."""
        for _, part in locals_of(model, "lm_head"):
            part.normal_(std=0.02)
        return model


class TieLostInHybrid(TieBroken, bug="tied-not-respected-rl"):
    """Only one strategy loses the tie."""

    story = "the tie is kept by plain sharding and lost on a mesh of two axes"
    test = "hsdp_vs_ddp"
    checks = ("ties",)
    causes = ("tie lost",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Break the tie on two axes only."""
        return super().before_load(arguments) if arguments["layout"].kind == "hsdp" else arguments


class TieLostOffRank0(TieBroken, bug="param-init-fn-unties-per-module"):
    """Ranks that get empty modules lose the tie; rank 0, with real weights, keeps it."""

    story = "memory is given out module by module, so that the second holder of a shared weight gets its own"
    test = "sharding_structure"
    checks = ("ties",)
    causes = ("tie lost",)
    deadline = 10.0

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Break the tie on all ranks but the first."""
        return super().before_load(arguments) if self.rank else arguments


class GuardSeesNoTie(TieBroken, bug="tied-guard-never-fires"):
    """A guard against tied weights looks at the wrapped model, where the tie is gone already."""

    story = "a guard that compares live parameters finds nothing shared after wrapping, and lets a lost tie through"
    test = "sharding_structure"
    checks = ("ties",)
    causes = ("tie lost", "switch without effect")

    def after_load(self, model: nn.Module) -> nn.Module:
        """Refuse a model with shared parameters: in vain."""
        held = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        if len(held) != len(set(held)):
            raise RuntimeError("tied weights are not supported here")
        return model


class CopyAndEmptyBuffer(TieBroken, bug="meta-load-tied-head-copied"):
    """Two bugs at once: the head is a copy, and rotary buffers are never set."""

    story = "a move to meta loading loses the tie and the buffers together; each has to be named"
    model = TIED
    test = "sharding_structure"
    checks = ("ties",)
    causes = ("tie lost", "buffer not filled")
    also = (("meta_init", "default", "buffers"),)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Zero the rotary frequencies."""
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.zero_()
                self.hit()
        return model


class TiedInTwoUnits(Fault, bug="tied-in-two-groups-rejected"):
    """Head and embedding are one parameter, and each gets a unit of its own."""

    story = "a tied weight is put into two FSDP units; torch says so at the first forward, or trains wrongly"
    variant = "tied"
    checks = ("ranks", "structure")
    causes = ("wrapped twice",)

    def patches(self) -> list[tuple[Any, Any]]:
        """Shard the modules of a group one by one."""
        original = fully_shard

        def partial(module: Any, **arguments: Any) -> Any:
            if not isinstance(module, list) or len(module) < 2:
                return original(module, **arguments)
            for single in module:
                original(single, **arguments)
            self.hit()
            return module

        return [(fully_shard, partial)]


class IdsRemembered(Fault, bug="id-reuse-false-duplicate"):
    """Parameters that are managed already are recognised by their ``id``."""

    story = "ids of parameters that no longer exist come back for new ones, which are refused as duplicates"
    checks = ("ranks",)
    causes = ("wrapped twice",)
    says = "already managed"

    def patches(self) -> list[tuple[Any, Any]]:
        """Keep a registry of ids, and no reference to what they belonged to."""
        original = fully_shard
        known: set[int] = set()

        def partial(module: Any, **arguments: Any) -> Any:
            for single in module if isinstance(module, list) else [module]:
                # a loader that goes block by block builds each one as it comes and drops the last
                fresh = [torch.empty(1, device="meta") for _ in single.parameters()]
                for item in fresh:
                    if id(item) in known:
                        self.hit()
                        raise ValueError(f"parameter of {type(single).__name__} is already managed by another unit")
                known.update(id(item) for item in fresh)
            return original(module, **arguments)

        return [(fully_shard, partial)]


# hooks


class ForwardOfBound(Fault, bug="bound-forward-bypasses-hooks"):
    """A block's bound ``forward`` is called instead of the block."""

    story = "someone keeps block.forward in a variable: the hooks that gather its weights never run"
    checks = ("ranks",)
    causes = ("forward reads other weights",)
    says = "DTensor"

    def after_load(self, model: nn.Module) -> nn.Module:
        """Bypass the hooks of one block."""
        block = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
        bypass(block, block.forward)
        self.hit()
        return model


class FusedKernel(Fault, bug="lora-kernel-reads-sharded-lora"):
    """A parent computes with the weights of a nested unit without calling it."""

    story = "a fused kernel reads the weights of a unit that nobody gathered"
    test = "manual_vs_ddp"
    checks = ("ranks",)
    causes = ("forward reads other weights",)
    says = "DTensor"

    def after_load(self, model: nn.Module) -> nn.Module:
        """Bypass the hooks of the innermost units."""
        for module in model.modules():
            nested = [child for child in module.modules() if child is not module and isinstance(child, FSDPModule)]
            if isinstance(module, FSDPModule) and not nested and hasattr(module, "gate_proj"):
                bypass(module, module.forward)
                self.hit()
        return model


class RecomputedWithoutCast(Fault, bug="ac-recompute-without-cast"):
    """Under activation checkpointing only the first pass casts its input."""

    story = "the recomputation returns before the cast, and its tensors are of another dtype than those saved"
    checks = ("ranks",)
    causes = ("wrong dtype",)
    says = "CheckpointError"

    def after_load(self, model: nn.Module) -> nn.Module:
        """Switch checkpointing on and run one activation in bf16, in the first pass only."""
        enable: Any = model
        enable.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "act_fn"):
                self._cast(module.act_fn)
        return model

    def _cast(self, act: Any) -> None:
        original = act.forward

        def forward(tensor: torch.Tensor) -> Any:
            if torch._C._current_graph_task_id() != -1:  # inside a backward
                return original(tensor)
            self.hit()
            return original(tensor.bfloat16()).to(tensor.dtype)

        act.forward = forward


# memory and switches


class _Memory(Fault):
    """Allocates in vain during a load."""

    test = "meta_init"
    variant = "default"
    checks = ("meta_init",)
    causes: ClassVar[tuple[str, ...]] = ("memory held",)

    def full(self, arguments: dict[str, Any]) -> nn.Module:
        """Build the whole model, with random weights, on this rank."""
        config = arguments["model_class"].config_class.from_pretrained(str(arguments["checkpoint"]))
        model: nn.Module = arguments["model_class"](config)
        self.hit()
        return model


class InitOffRank0(_Memory, bug="nonzero-rank-reinit"):
    """The ranks that will receive the weights initialise a model first."""

    story = "what is about to be overwritten is drawn at random first, on all ranks but the first"
    blamed = 1

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build a model off rank 0."""
        if self.rank:
            self.full(arguments)
        return arguments


class WholeFileEverywhere(_Memory, bug="env-switch-not-wired"):
    """The memory-saving switch never reaches its readers: every rank reads the whole checkpoint."""

    story = "the switch is set in the config and never exported, so every rank reads everything"
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Read all files, and copy what was read."""
        from safetensors.torch import load_file

        self.held = [
            tensor.clone() + 0
            for file in sorted(arguments["checkpoint"].glob("*.safetensors"))
            for tensor in load_file(file).values()
        ]
        self.hit()
        return arguments


class ZerosOffRank0(_Memory, bug="every-rank-full-in-host-ram"):
    """Ranks that wait for the weights hold zeros of full size."""

    story = "placeholders of the waiting ranks are zeros in CPU memory instead of meta tensors"
    blamed = 1

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Allocate zeros and a copy for the preparation."""
        if self.rank:
            with torch.device("meta"):
                shapes = [parameter.shape for parameter in self.full(arguments).parameters()]
            self.held = [torch.zeros(shape) + 0 for shape in shapes]
        return arguments


class TiedLoadsEverywhere(_Memory, bug="tied-disables-rank0-load"):
    """Tied models fall back to a full load on every rank."""

    story = "a guard from older days turns meta loading off where weights are tied"
    model = TIED
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build the full model if the config ties weights."""
        if arguments["model_class"].config_class.from_pretrained(str(arguments["checkpoint"])).tie_word_embeddings:
            self.full(arguments)
        return arguments


class FlagOnlyInDataclass(_Memory, bug="plugin-flag-not-in-env"):
    """A flag set in code is not seen where an environment variable is asked."""

    story = "the flag lives in an object, its reader looks at the environment, and each rank builds the model"
    causes = ("switch without effect", "memory held")

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build the full model in the case's dtype on each rank."""
        self.full(arguments).to(arguments["dtype"])
        return arguments


class WholeBeforeCut(_Memory, bug="fsdp2-2x-spike"):
    """The whole model is on the device beside its shards while they are made."""

    story = "the model is moved as a whole and cut afterwards: for a moment both are there"

    def after_load(self, model: nn.Module) -> nn.Module:
        """Gather all parameters at once, copy them, cut them again."""
        whole = [p.full_tensor().clone() if isinstance(p, DTensor) else p for p in model.parameters()]
        self.hit()
        with torch.no_grad():
            for parameter, full in zip(model.parameters(), whole, strict=True):
                if isinstance(parameter, DTensor) and local(parameter).numel():
                    part = full.detach().clone().chunk(self.world_size)[self.rank]
                    local(parameter.detach()).copy_(part)
        return model
