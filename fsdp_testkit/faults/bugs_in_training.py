"""Museum: bugs of losses, gradients, reductions, clipping and optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import AroundMicroBatch, BeforeClip, LossWeights, blocks_of, local, locals_of

MOE = "qwen3_moe"


class MeanAfterGlobalCount(LossWeights, bug="loss-all-reduce-then-mean-shrinks-lr"):
    """The loss is divided by the tokens of all ranks, and the wrapper averages over ranks once more."""

    story = "each rank divides by the global token count, then the wrapper takes the mean over ranks again"
    checks = ("gradients", "gradient_norm")
    causes = ("wrong factor",)

    def factors(self, tokens: list[int], right: list[float]) -> list[float]:
        """Forget the number of ranks."""
        return [weight / self.world_size for weight in right]


class DividedTwice(MeanAfterGlobalCount, bug="global-token-norm-divides-twice"):
    """The same on a 2 x 2 mesh: a quarter of the gradient is left."""

    story = "the division by the token count does not undo the wrapper's division by the ranks of both mesh axes"
    test = "hsdp_vs_ddp"


class RawSums(LossWeights, bug="token-sum-backprop-not-normalised"):
    """Backward runs on sums over tokens."""

    story = "the declared token count is handed over and never used: gradients grow with the number of tokens"
    checks = ("gradients", "gradient_norm")
    causes = ("wrong normaliser",)

    def factors(self, tokens: list[int], right: list[float]) -> list[float]:
        """Turn means back into sums."""
        return [float(count) for count in tokens]


class SampleRatio(LossWeights, bug="grad-accum-sample-ratio-vs-token-mean"):
    """Micro-batches are combined by their share of samples instead of tokens."""

    story = "each micro-batch takes its own token mean, and all count the same whatever their length"
    checks = ("gradients",)
    causes = ("wrong normaliser",)
    fields = (("micro_batches", 3), ("normalisers", ("token_mean",)))

    def factors(self, tokens: list[int], right: list[float]) -> list[float]:
        """Give each micro-batch the same share."""
        return [1.0 / len(tokens)] * len(tokens)


class ExpertsUnderdivided(BeforeClip, bug="expert-grads-too-big-by-ep"):
    """Gradients of experts lack one divisor."""

    story = "experts are averaged over too few ranks: their gradients are twice as large, dense ones are right"
    checks = ("gradients",)
    causes = ("wrong factor",)
    model = MOE

    def gradients(self, model: nn.Module) -> None:
        """Scale the experts' gradients."""
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.grad is not None:
                local(parameter.grad).mul_(2.0)
                self.hit()


class NewestMicroBatchOnly(AroundMicroBatch, bug="cpu-offload-accum-outside-no-sync"):
    """A reduced gradient replaces the one that was accumulated."""

    story = "with accumulation the newest micro-batch's gradient takes the place of the earlier ones"
    checks = ("gradients",)
    causes = ("gradient part lost",)
    fields = (("micro_batches", 2),)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Reduce at once, and drop what is there already."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = None
                self.hit()


class PartialSumRounded(AroundMicroBatch, bug="hsdp-partial-sum-rounded"):
    """The partial sums that wait for the all-reduce are kept in bf16."""

    story = "sums over micro-batches that wait for the replicas' all-reduce are rounded to bf16"
    test = "hsdp_vs_ddp"
    checks = ("gradients",)
    causes = ("rounding only",)
    fields = (("micro_batches", 3),)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Reduce over the shards in each micro-batch, over the replicas in the last one."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(True)
        model.set_requires_all_reduce(last)

    def leave(self, model: nn.Module, last: bool) -> None:
        """Round the sums of an fp32 run."""
        assert self.case is not None
        if last or self.case.dtype != "float32":
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                sums = getattr(group, "_partial_reduce_output", None)
                if sums is not None:
                    sums.copy_(sums.bfloat16())
                    self.hit()


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
    model = MOE
    word = "experts"


class OneGroupOfAll(Fault, bug="optimizer-gets-all-params"):
    """All parameters land in the first group of the optimizer, frozen ones too."""

    story = "rebinding after sharding fills the first group with every parameter of the model"
    test = "manual_vs_ddp"
    checks = ("optimizer_binding",)
    causes = ("optimizer on other tensors",)

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Merge the groups."""
        optimizer.param_groups[0]["params"] = list(model.parameters())
        del optimizer.param_groups[1:]
        self.hit()


class AdapterOfOtherRanks(Fault, bug="lora-trains-only-some-shards"):
    """On all ranks but the first, the optimizer holds placeholders of some trained parameters."""

    story = "beside frozen weights, the trained shards of rank 1 are replaced after the optimizer took them"
    test = "manual_vs_ddp"
    checks = ("optimizer_binding", "movement")
    causes = ("optimizer on other tensors",)
    blamed = 1

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Swap the first parameters for copies."""
        if self.rank:
            held = optimizer.param_groups[0]["params"]
            held[:3] = [nn.Parameter(parameter.detach().clone()) for parameter in held[:3]]
            self.hit()


class NotSwitched(Fault, bug="optimizer-param-not-switched"):
    """The map from old to new parameters misses one-dimensional ones."""

    story = "parameters that a cast replaced are not found again, and the optimizer keeps the old objects"
    checks = ("optimizer_binding", "movement")
    causes = ("optimizer on other tensors",)

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep copies in the group of norms."""
        group = optimizer.param_groups[1]
        group["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
        self.hit()


class KeyFromConfig(Fault, bug="mutual-tied-keyerror"):
    """Parameters are looked up by the names that the config implies."""

    story = "the optimizer's mapping asks for a head that a tied model does not list"
    variant = "tied"
    checks = ("ranks",)
    causes = ("rank died",)
    says = "KeyError"

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Look the head up by name."""
        self.hit()
        named = dict(model.named_parameters())
        assert named["lm_head.weight"] is not None
        return model


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


class OwnNorm(Fault, bug="logged-norm-is-local"):
    """The reported norm is that of this rank's shards."""

    story = "clipping is right, but the logged norm is read before it is summed over the shards"
    checks = ("gradient_norm",)
    causes = ("norm of one rank",)

    def wrap(self, backend: Backend) -> Backend:
        """Report another number."""
        inner: Any = backend
        original = inner.clip

        def clip(model: Any, max_norm: float) -> float:
            norm = own_norm(model)
            original(model, max_norm)
            self.hit()
            return norm

        inner.clip = clip
        return super().wrap(backend)


class ClippedByOwnNorm(Fault, bug="clip-on-cpu-grads-no-backend"):
    """Each rank clips by the norm of its own shards (the silent way around a missing CPU group)."""

    story = "gradients are scaled by a norm that never left the rank"
    checks = ("gradients", "gradient_norm")
    causes = ("norm of one rank",)

    def wrap(self, backend: Backend) -> Backend:
        """Clip without communication."""
        inner: Any = backend

        def clip(model: Any, max_norm: float) -> float:
            norm = own_norm(model)
            if max_norm and norm > max_norm:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        local(parameter.grad).mul_(max_norm / norm)
            self.hit()
            return norm

        inner.clip = clip
        return super().wrap(backend)


def own_norm(model: nn.Module) -> float:
    """Return the norm over this rank's parts of the gradients."""
    parts = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


class ClipIgnored(Fault, bug="clip-args-never-reach-test"):
    """The bound of the norm gets lost on its way."""

    story = "max_norm is accepted and not passed on, so nothing is ever clipped"
    checks = ("gradients",)
    causes = ("switch without effect",)

    def wrap(self, backend: Backend) -> Backend:
        """Measure only."""
        inner: Any = backend
        original = inner.clip

        def clip(model: Any, max_norm: float) -> float:
            if max_norm:
                self.hit()
            norm: float = original(model, 0.0)
            return norm

        inner.clip = clip
        return super().wrap(backend)


class OtherOrder(BeforeClip, bug="set-order-of-grads"):
    """One rank hands its gradients over in another order than the others."""

    story = "two gradients of equal size change places on rank 1: nothing hangs, the sums are mixed"
    checks = ("gradients",)
    causes = ("collective mismatch",)
    blamed = 1

    def gradients(self, model: nn.Module) -> None:
        """Swap the first matrices of two blocks on rank 1."""
        if self.rank != 1:
            return
        left, right = (next(p for p in block.parameters() if p.ndim > 1) for block in blocks_of(model)[:2])
        assert left.grad is not None
        assert right.grad is not None
        one, two = local(left.grad), local(right.grad)
        kept = one.clone()
        one.copy_(two)
        two.copy_(kept)
        self.hit()


class MeshOfOthers(Fault, bug="fsdp-mesh-is-the-sp-mesh"):
    """The mesh of another kind of parallelism is passed: all ranks replicate, none shards."""

    story = "a 4 x 1 mesh stands where replicas x shards is 2 x 2: numbers are right, nothing is sharded"
    test = "hsdp_vs_ddp"
    checks = ("structure",)
    causes = ("reduced over the wrong group",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Swap the mesh."""
        self.hit()
        return arguments | {"layout": Layout(kind="hsdp", replicate=self.world_size, shard=1)}


class UnknownMode(Fault, bug="unknown-mode-falls-through"):
    """A sharding mode that is not understood runs as full sharding."""

    story = "the name of the hybrid mode is misspelt somewhere and the default branch takes over without a word"
    test = "hsdp_vs_ddp"
    checks = ("structure",)
    causes = ("switch without effect",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Shard over all ranks."""
        self.hit()
        return arguments | {"layout": Layout(kind="fsdp", shard=self.world_size)}


class ReplicasStartApart(Fault, bug="hsdp-replicas-start-different"):
    """The second replica starts from other weights."""

    story = "nothing brings the replicas to the same start: each one has drawn its own numbers"
    test = "hsdp_vs_ddp"
    checks = ("initial_weights", "replicas")
    causes = ("replica diverged",)
    blamed = 2

    def after_load(self, model: nn.Module) -> nn.Module:
        """Draw other numbers on the second replica."""
        if self.rank >= self.world_size // 2:
            generator = torch.Generator().manual_seed(7 + dist.get_rank() % (self.world_size // 2))
            for _, part in locals_of(model):
                part.copy_(torch.empty_like(part).normal_(std=0.02, generator=generator))
            self.hit()
        return model
