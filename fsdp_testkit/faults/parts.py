"""What many faults share: names of parameters, a place around each micro-batch, one before clipping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.backends.loop import gradient_sync
from fsdp_testkit.faults.base import Fault


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(model: nn.Module, word: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, local part) of the parameters whose name holds ``word``; empty parts are left out."""
    for name, parameter in model.named_parameters():
        part = local(parameter.detach())
        if word in name and part.numel():
            yield name, part


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks: the members of the first module list that holds more than one."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            return list(module)
    return []


def bypass(module: nn.Module, function: Any) -> None:
    """Let calls of one module run ``function`` and nothing else: no hook of the module runs."""
    slot: Any = module
    slot._compiled_call_impl = function  # what torch's own ``Module.compile`` sets


class AroundMicroBatch(Fault):
    """Acts before the forward and after the backward of each micro-batch."""

    count = 0  # micro-batches so far

    def patches(self) -> list[tuple[Any, Any]]:
        """Put `enter` and `leave` around the loop's own context."""
        original = gradient_sync  # this module's own name is replaced too

        @contextlib.contextmanager
        def around(model: Any, *, last: bool) -> Iterator[None]:
            with original(model, last=last):
                self.enter(model, last)
                yield
                self.leave(model, last)
                self.count += 1

        return [(gradient_sync, around)]

    def enter(self, model: nn.Module, last: bool) -> None:
        """Act before the forward."""

    def leave(self, model: nn.Module, last: bool) -> None:
        """Act after the backward."""


class BeforeClip(Fault):
    """Acts on the gradients of a step after the last backward and before clipping."""

    def wrap(self, backend: Backend) -> Backend:
        """Put `gradients` before the loop's clipping."""
        inner: Any = backend
        original = inner.clip

        def clip(model: Any, max_norm: float) -> float:
            self.gradients(model)
            norm: float = original(model, max_norm)
            return norm

        inner.clip = clip
        return super().wrap(backend)

    def gradients(self, model: nn.Module) -> None:
        """Change gradients."""


class LossWeights(Fault):
    """Replaces the factors of the losses where a token mean is declared."""

    def wrap(self, backend: Backend) -> Backend:
        """Replace the loop's factors."""
        inner: Any = backend
        original = inner.loss_weights

        def loss_weights(model: Any, micro_batches: Any, normaliser: str) -> list[float]:
            right: list[float] = original(model, micro_batches, normaliser)
            if normaliser != "token_mean":
                return right
            self.hit()
            return self.factors([batch.tokens for batch in micro_batches], right)

        inner.loss_weights = loss_weights
        return super().wrap(backend)

    def factors(self, tokens: list[int], right: list[float]) -> list[float]:
        """Return the wrong factors of this rank's micro-batches."""
        raise NotImplementedError
