"""Rounding, of the kind that is explained by the dtype of a case, and of the kind that is not.

Both leave fp64 runs alone, as another order of a sum and a narrow matmul do; how large they are tells them apart.
"""

from __future__ import annotations

import torch
from torch import nn

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import BeforeClip, local


class OtherOrderOfSums(BeforeClip):
    """Gradients of fp32 runs are off by a few hundred units in the last place. A test must not fail for it."""

    story = "a long sum is taken in another order"
    size = 3e-5

    def gradients(self, model: nn.Module) -> None:
        """Scale all gradients a little."""
        assert self.case is not None
        for parameter in model.parameters():
            if parameter.grad is not None and self.case.dtype == "float32":
                local(parameter.grad).mul_(1.0 + self.size)
                self.hit()


class HalfPrecision(BeforeClip):
    """Gradients of fp32 runs have ten bits of mantissa, those of fp16 and TF32."""

    story = "a narrower format is used where fp32 was asked for, in fp32 runs only"
    checks = ("gradients",)
    causes = ("rounding only",)

    def gradients(self, model: nn.Module) -> None:
        """Cut the last 13 bits of each number, to nearest."""
        assert self.case is not None
        for parameter in model.parameters():
            if parameter.grad is not None and self.case.dtype == "float32":
                part = local(parameter.grad)
                bits = part.view(torch.int32)
                bits.add_(1 << 12).bitwise_and_(~((1 << 13) - 1))
                self.hit()


FAULTS: tuple[type[Fault], ...] = (OtherOrderOfSums, HalfPrecision)
