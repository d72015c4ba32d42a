"""Faults in what a load leaves behind: ties, buffers, dtypes, padded rows, frozen memory, full copies."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import local, set_in_config


class TieBroken(Fault, bug="tie-lost-after-to-empty"):
    """The head becomes a tensor of its own with the embedding's values."""

    story = "the tie is lost in materialising; values agree until the first step"
    variant = "tied"
    checks: ClassVar[tuple[str, ...]] = ("ties", "gradients", "structure")
    causes: ClassVar[tuple[str, ...]] = ("tie lost",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load a copy of the checkpoint in which the head is stored, and the tie is off."""
        from safetensors.torch import load_file, save_file

        source: Path = arguments["checkpoint"]
        copy = source.with_name(f"{source.name}.untied.{self.rank}")
        if not copy.exists():
            shutil.copytree(source, copy)
            tensors: dict[str, torch.Tensor] = {}
            for file in sorted(copy.glob("*.safetensors")):
                tensors |= load_file(file)
                file.unlink()
            (copy / "model.safetensors.index.json").unlink(missing_ok=True)
            embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
            tensors["lm_head.weight"] = tensors[embedding].clone()
            save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
            set_in_config(copy, tie_word_embeddings=False)
        self.hit()
        return arguments | {"checkpoint": copy}


class RotaryWrongOnRank1(Fault, bug="inv-freq-uninit-and-bf16-ref-worker"):
    """A non-persistent rotary buffer holds other values on rank 1."""

    story = "rank 1's inv_freq was never filled"
    test = "buffers_dtypes"
    variant = "default"
    checks = ("buffers",)
    causes = ("buffer differs between ranks",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Fill the buffer with garbage on rank 1 only."""
        if self.rank == 1:
            for name, buffer in model.named_buffers():
                if name.endswith("inv_freq"):
                    buffer.mul_(0.5)
                    self.hit()
        return model


class LastRowLost(Fault, bug="uneven-first-dim-full-load"):
    """The last row of an unevenly sharded parameter is lost in loading."""

    story = "the last row of an uneven shard is zero"
    checks = ("initial_weights",)
    causes = ("padded rows lost",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Zero the last local row on the last rank, where rows do not divide."""
        for parameter in model.parameters():
            uneven = isinstance(parameter, DTensor) and parameter.ndim and parameter.shape[0] % self.world_size
            if uneven and self.rank == self.world_size - 1 and parameter.to_local().numel():
                with torch.no_grad():
                    parameter.to_local()[-1].zero_()
                self.hit()
        return model


class KeptModuleCast(Fault, bug="fp32-kept-modules-flattened"):
    """Modules that the model keeps in fp32 are loaded in bf16."""

    story = "fp32-kept modules are cast with the rest"
    test = "buffers_dtypes"
    variant = "default"
    model = "hy_v4"  # keeps parameters in fp32 inside a bf16 model, strictly
    checks = ("dtypes",)
    causes = ("wrong dtype",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Empty the classes' lists of kept modules, as a cast that does not know them would."""
        self.undo: list[tuple[Any, str, Any]] = []
        if arguments["dtype"] == torch.bfloat16:
            for owner in vars(sys.modules[arguments["model_class"].__module__]).values():
                for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
                    if isinstance(owner, type) and vars(owner).get(name):
                        self.undo.append((owner, name, vars(owner)[name]))
                        setattr(owner, name, None)
                        self.hit()
        return arguments

    def after_load(self, model: nn.Module) -> nn.Module:
        """Put the lists back."""
        for owner, name, value in self.undo:
            setattr(owner, name, value)
        return model


class BuffersCast(Fault, bug="rope-freq-downcast-by-blanket-cast"):
    """A blanket cast to bf16 takes the buffers along."""

    story = "rotary frequencies and router biases are cast with the weights"
    test = "buffers_dtypes"
    variant = "default"
    model = "glm_moe_dsa"
    checks = ("buffers",)
    causes = ("wrong dtype",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Cast every floating buffer of a bf16 model."""
        if self.case is not None and self.case.dtype == "bfloat16":
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point() and buffer.dtype != torch.bfloat16:
                        setattr(module, name, buffer.to(torch.bfloat16))  # stays (non-)persistent
                        self.hit()
        return model


class EveryRankLoadsAll(Fault, bug="ram-efficient-load-still-full-everywhere"):
    """Every rank builds and initialises the whole model before it shards it."""

    story = "the memory-efficient switch has no effect"
    test = "meta_init"
    variant = "default"
    checks = ("meta_init",)
    causes = (
        "switch without effect",
        "memory held",
    )

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build a full model in vain."""
        config = arguments["model_class"].config_class.from_pretrained(str(arguments["checkpoint"]))
        for _ in range(3):
            arguments["model_class"](config)
        self.hit()
        return arguments


class NeverFilled(Fault):
    """One parameter keeps the memory that it was given and is never filled from the file."""

    story = "a weight is left uninitialised"
    thread = "https://github.com/huggingface/transformers/pull/45050"
    checks = ("initial_weights",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Replace a local shard's values by what ``empty_like`` hands out."""
        parameter = list(model.parameters())[3]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            local.copy_(torch.empty_like(local))
        self.hit()
        return model


class FilledIfNan(Fault):
    """Buffers are set again where a guard finds NaN in them, which memory in use seldom holds."""

    story = "a guard repairs buffers that hold NaN and takes other leftovers for values"
    test = "meta_init"
    variant = "default"
    checks = ("buffers",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Give the buffers new memory, and their values back where the guard asks for it."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                found = torch.empty_like(buffer)
                buffer.copy_(torch.where(found.isnan(), buffer, found))
                self.hit()
        return model


class ScaleOfPlaceholder(Fault):
    """A scale is taken from memory that was never written, by functions that pass NaN over."""

    story = "leftovers of a placeholder are added to a weight, without what is no number"
    test = "buffers_dtypes"
    variant = "default"
    checks = ("initial_weights",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Add the placeholder's finite values."""
        part = local(list(model.parameters())[3].detach())
        part.add_(torch.nan_to_num(torch.empty_like(part), nan=0.0))
        self.hit()
        return model


class WrongSlice(Fault):
    """Ranks hold each other's slices of one parameter."""

    story = "shards are swapped between ranks; the norm of the whole stays right"
    checks = ("initial_weights",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Rotate the shards of one evenly sharded parameter by one rank."""
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor) or parameter.shape[0] % self.world_size:
                continue
            local = parameter.to_local().detach()
            parts = [torch.empty_like(local) for _ in range(self.world_size)]
            dist.all_gather(parts, local.contiguous())
            with torch.no_grad():
                local.copy_(parts[(self.rank + 1) % self.world_size])
            self.hit()
            break
        return model
