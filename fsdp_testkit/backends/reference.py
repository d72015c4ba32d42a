"""The kit's own loader and saver as a backend: what every rule is tried on first.

Pytest's own process asks a backend for its capabilities; it has no use for transformers, which the names of
`fsdp_testkit.reference` import when they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fsdp_testkit.reference as reference
from fsdp_testkit.backends.base import CAPABILITIES, NO_FEATURES, PROMISES, Features
from fsdp_testkit.backends.groups import mesh_of
from fsdp_testkit.backends.loop import TrainingLoop, recompute

if TYPE_CHECKING:
    from fsdp_testkit.core.layout import Layout


class ReferenceBackend(TrainingLoop):
    """`fsdp_testkit.reference` on the layout's mesh; trains in the model's dtype."""

    name = "reference"
    capabilities = CAPABILITIES | PROMISES

    def load(
        self,
        checkpoint: Path,
        *,
        model_class: type[nn.Module],
        layout: Layout,
        plan: Any,
        dtype: torch.dtype,
        features: Features = NO_FEATURES,
    ) -> nn.Module:
        """Load and shard a checkpoint folder (safetensors or DCP) on the layout's mesh."""
        self.reduce_each, self.refuse_nonfinite = features.reduce_each, features.refuse_nonfinite
        if features.mixed_precision or features.cpu_offload:
            options = {"mixed_precision": features.mixed_precision or None, "cpu_offload": features.cpu_offload}
            plan = {**({"mode": "auto"} if plan == "auto" else plan), "options": options}
        model: nn.Module = reference.load_sharded(checkpoint, mesh_of(layout), plan, dtype, model_class=model_class)
        if features.activation_checkpointing:
            recompute(model)
        return model

    def save(self, model: nn.Module, folder: Path, *, layout: str) -> None:
        """Save weights as ``"safetensors"`` or ``"dcp"``."""
        reference.save_sharded(model, folder, layout=layout, durable=False)  # no check cuts the power

    def save_training(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
        """Save optimizer, scheduler and RNG state of every rank beside the weights."""
        reference.save_training(model, optimizer, scheduler, folder, durable=False)

    def load_training(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
        """Restore what `save_training` wrote, in place."""
        reference.load_training(model, optimizer, scheduler, folder)
