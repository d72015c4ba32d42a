"""Museum: forwards that bypass the hooks of units, and recomputed ones that differ from the first pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_testkit.core.case import Case
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import AroundMicroBatch, blocks_of, bypass, locals_of


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


class StaleCompute(AroundMicroBatch, bug="stale-compute-weights-after-step"):
    """The optimizer moves the weights, forwards keep using those of the load."""

    story = "forward and backward read copies that nobody refreshes after a step"
    checks = ("losses",)
    causes = ("forward reads other weights",)
    word = ""

    def after_load(self, model: nn.Module) -> nn.Module:
        """Take the copies."""
        self.copies = {name: part.clone() for name, part in locals_of(model, self.word)}
        return model

    def enter(self, model: nn.Module, last: bool) -> None:
        """Put the copies in."""
        self.main = {name: part.clone() for name, part in locals_of(model, self.word)}
        self._write(model, self.copies)
        self.hit()

    def leave(self, model: nn.Module, last: bool) -> None:
        """Put the trained weights back."""
        self._write(model, self.main)

    def _write(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, part in locals_of(model, self.word):
                part.copy_(values[name])


class StaleExperts(StaleCompute, bug="expert-weights-never-train-alias-lost"):
    """The same for the fused expert weights alone."""

    story = "grouped experts compute with storage of their own, which the optimizer's update never reaches"
    model = "qwen3_moe"
    word = "experts"


class NewMasks(Fault, bug="ac-recompute-new-dropout-mask"):
    """Recomputed forwards draw dropout masks of their own."""

    story = "activation checkpointing does not restore the generator for the recomputation"
    model = "gpt2"
    dropout = 0.2
    checks = ("gradients",)
    causes = ("RNG not restored",)
    fields = (("steps", 3),)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Switch checkpointing on without keeping the random state."""
        enable: Any = model
        enable.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.hit()
        return model


class GeneratorStands(AroundMicroBatch, bug="dtensor-init-repeats-same-numbers"):
    """The generator is put back after use and never advances."""

    story = "each use of the CPU generator is undone afterwards: the same random numbers come again and again"
    model = "gpt2"
    dropout = 0.2
    checks = ("losses",)
    causes = ("RNG not restored",)
    fields = (("steps", 3),)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Remember the state."""
        self.state = torch.get_rng_state()

    def leave(self, model: nn.Module, last: bool) -> None:
        """Put it back."""
        torch.set_rng_state(self.state)
        self.hit()


class PhaseInBf16(Fault, bug="rope-phase-in-bf16"):
    """Rotary frequencies are rounded to bf16 inside the forward; the buffer itself stays right."""

    story = "frequencies are cast to the activations' dtype before they meet the positions"
    checks = ("losses", "gradients")
    causes = ("wrong dtype",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Round before each forward of the rotary module, and undo it afterwards."""
        for name, module in model.named_modules():
            if name.endswith("rotary_emb"):
                module.register_forward_pre_hook(self._round)
                module.register_forward_hook(self._restore)
        return model

    def _round(self, module: Any, arguments: Any) -> None:
        self.kept = module.inv_freq
        module.inv_freq = module.inv_freq.bfloat16().to(module.inv_freq.dtype)
        self.hit()

    def _restore(self, module: Any, arguments: Any, output: Any) -> None:
        module.inv_freq = self.kept


class Detached(Fault, bug="lora-grads-only-in-layer-0"):
    """The gradient's path is cut between two blocks."""

    story = "what comes out of one block is detached, so that the blocks before it get no gradient"
    checks = ("gradients", "movement")
    causes = ("gradient part lost",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Detach the first block's output."""

        def detach(*hooked: Any) -> Any:
            output = hooked[-1]
            self.hit()
            return output.detach() if isinstance(output, torch.Tensor) else (output[0].detach(), *output[1:])

        blocks_of(model)[0].register_forward_hook(detach)
        return model


class NotGatheredAgain(Fault, bug="two-forwards-before-backward"):
    """A recomputation takes for granted that its unit is still gathered."""

    story = "with two forwards before a backward, one recomputation meets a nested unit that the other has resharded"
    test = "two_forwards"
    variant = "default"
    checks = ("ranks", "gradients")
    causes = ("forward reads other weights",)

    @contextlib.contextmanager
    def arm(self, *, rank: int, world_size: int, case: Case) -> Iterator[None]:
        """Leave the hook before a recomputed forward early, as it was before torch gathered there.

        https://github.com/pytorch/pytorch/pull/171779
        """
        from torch.distributed.fsdp._fully_shard import _fsdp_state as torch_state

        owner: Any = torch_state.FSDPState
        original = owner._pre_forward

        def early(state: Any, module: Any, args: Any, kwargs: Any) -> Any:
            if state._training_state == torch_state.TrainingState.PRE_BACKWARD:
                if not all(group.is_unsharded for group in state._fsdp_param_groups):
                    self.hit()
                return state._cast_forward_inputs(args, kwargs)
            return original(state, module, args, kwargs)

        owner._pre_forward = early
        try:
            with super().arm(rank=rank, world_size=world_size, case=case):
                yield
        finally:
            owner._pre_forward = original
