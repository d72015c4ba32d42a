"""Museum: bugs of losses, gradients, reductions, clipping and optimizers."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_testkit.faults.parts import AroundMicroBatch, BeforeClip, LossWeights, blocks_of, local

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


class SyncEveryTime(AroundMicroBatch, bug="no-sync-is-noop"):
    """Switching the reduction off has no effect: gradients are reduced in each micro-batch."""

    story = "the context that saves communication knows one kind of wrapper only and passes others through in silence"
    test = "accumulation"
    checks = ("reductions",)
    causes = ("switch without effect",)

    def enter(self, model: nn.Module, last: bool) -> None:
        """Reduce all the same."""
        if not last and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
            self.hit()
