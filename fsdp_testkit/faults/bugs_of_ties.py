"""Museum: bugs of tied weights, and of units that hold a parameter twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Sharding, locals_of
from fsdp_testkit.faults.weights import TieBroken

TIED = "gemma"  # tied by default, with rotary buffers


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


class TieLostOffRank0(Fault, bug="param-init-fn-unties-per-module"):
    """Ranks that get empty modules lose the tie; rank 0, with real weights, keeps it."""

    story = "memory is given out module by module, so that the second holder of a shared weight gets its own"
    test = "sharding_structure"
    variant = "tied"
    checks = ("ties",)
    causes = ("tie lost",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Give the head memory of its own on all ranks but the first."""
        if self.rank:
            head: Any = model.get_submodule("lm_head")
            head.weight = nn.Parameter(head.weight.detach().clone())
            self.hit()
        return model


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


class TiedInTwoUnits(Sharding, bug="tied-in-two-groups-rejected"):
    """Head and embedding are one parameter, and each gets a unit of its own."""

    story = "a tied weight is put into two FSDP units; torch says so at the first forward, or trains wrongly"
    variant = "tied"
    checks = ("ranks", "structure")
    causes = ("wrapped twice",)

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Shard the modules of a group one by one."""
        if not isinstance(module, list) or len(module) < 2:
            return original(module, **arguments)
        for single in module:
            original(single, **arguments)
        self.hit()
        return module


class IdsRemembered(Sharding, bug="id-reuse-false-duplicate"):
    """Parameters that are managed already are recognised by their ``id``."""

    story = "ids of parameters that no longer exist come back for new ones, which are refused as duplicates"
    checks = ("ranks",)
    causes = ("wrapped twice",)
    says = "already managed"

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Keep a registry of ids, and no reference to what they belonged to."""
        for single in module if isinstance(module, list) else [module]:
            # a loader that goes block by block builds each one as it comes and drops the last
            fresh = [torch.empty(1, device="meta") for _ in single.parameters()]
            for item in fresh:
                if id(item) in self.known:
                    self.hit()
                    raise ValueError(f"parameter of {type(single).__name__} is already managed by another unit")
            self.known.update(id(item) for item in fresh)
        return original(module, **arguments)
