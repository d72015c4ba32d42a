"""What many faults share: parts of a model, and places to act at: micro-batches, clipping, sharding, saved files."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
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


class Instead(Fault):
    """Runs `instead` in the place of one method of the backend."""

    method: ClassVar[str]

    def wrap(self, backend: Backend) -> Backend:
        """Replace the method of the backend itself, so that its own calls meet the fault too."""
        setattr(backend, self.method, functools.partial(self.instead, getattr(backend, self.method)))
        return super().wrap(backend)

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Do what the method does, wrongly; ``original`` is the method."""
        raise NotImplementedError


class BeforeClip(Instead):
    """Acts on the gradients of a step after the last backward and before clipping."""

    method = "clip"

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Change gradients, then clip."""
        self.gradients(arguments[0])
        return original(*arguments, **named)

    def gradients(self, model: nn.Module) -> None:
        """Change gradients."""


class LossWeights(Instead):
    """Replaces the factors of the losses where a token mean is declared."""

    method = "loss_weights"

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Return wrong factors for a token mean."""
        _, micro_batches, normaliser = arguments
        right: list[float] = original(*arguments, **named)
        if normaliser != "token_mean":
            return right
        self.hit()
        return self.factors([batch.tokens for batch in micro_batches], right)

    def factors(self, tokens: list[int], right: list[float]) -> list[float]:
        """Return the wrong factors of this rank's micro-batches."""
        raise NotImplementedError


class Sharding(Fault):
    """Runs `shard` in the place of ``fully_shard``."""

    def patches(self) -> list[tuple[Any, Any]]:
        """Replace ``fully_shard`` wherever a module holds it."""
        return [(fully_shard, functools.partial(self.shard, fully_shard))]

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Shard a module or a list of modules, wrongly; ``original`` is ``fully_shard``."""
        raise NotImplementedError


class Rewritten(Fault):
    """Rank 0 rewrites the tensors of the saved safetensors files; the others wait."""

    test = "save_load"
    checks: ClassVar[tuple[str, ...]] = ("files", "ranks")
    causes: ClassVar[tuple[str, ...]] = ("key missing or extra in a file",)

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Apply `change` to the one file that it wants to change."""
        if self.rank == 0 and layout == "safetensors":
            from safetensors.torch import load_file, save_file

            for file in sorted(folder.glob("*.safetensors")):
                tensors = load_file(file)
                if self.change(tensors):
                    save_file(tensors, file, metadata={"format": "pt"})
                    self.hit()
                    break
        dist.barrier()

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Change the tensors of a file in place; return whether anything changed."""
        raise NotImplementedError


def set_in_config(folder: Path, **values: Any) -> None:
    """Change fields of a saved ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
