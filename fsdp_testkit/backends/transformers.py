"""transformers' own FSDP2 path: the adapter, and the only file that knows its moving helpers.

Seen in transformers 5.23.0: ``DistributedConfig`` in ``transformers.distributed``; optimizer helpers in
``transformers.distributed.checkpoint``. They moved in 5.21 and 5.22; ``tests/backends`` notices the next time.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fsdp_testkit.backends.base import CAPABILITIES, NO_FEATURES, Features
from fsdp_testkit.backends.loop import TrainingLoop, recompute
from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.core.layout import Layout

#: The kit's options in transformers' words.
_STYLES = {True: "free_full_weight", False: "keep_full_weight", None: "free_full_weight"}


class TransformersBackend(TrainingLoop):
    """``from_pretrained(distributed_config=...)``, ``save_pretrained``, DCP and optimizer helpers of transformers."""

    name = "transformers"
    # transformers pins offloaded memory always, for which torch needs an accelerator
    capabilities: frozenset[str] = CAPABILITIES - (set() if torch.accelerator.is_available() else {"cpu_offload"})

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
        """Shard while loading, by transformers' default plan or the given rules on top of it.

        Raises:
            EnvironmentLacksError: accelerate is not installed; transformers loads through a device map, which needs it.
        """
        require_accelerate()
        self.reduce_each, self.refuse_nonfinite = features.reduce_each, features.refuse_nonfinite
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(
            fsdp_size=layout.shard,
            dp_replicate_size=layout.replicate,
            fsdp_plan=translate_plan(plan),
            fsdp_cpu_offload=features.cpu_offload or any_option(plan, "cpu_offload"),
            fsdp_mixed_precision=bool(features.mixed_precision) or any_option(plan, "mixed_precision"),
        )
        loader: Any = model_class
        model: nn.Module = loader.from_pretrained(str(checkpoint), distributed_config=config, dtype=dtype)
        if features.activation_checkpointing:
            recompute(model)
        return model

    def save(self, model: nn.Module, folder: Path, *, layout: str) -> None:
        """``save_pretrained`` from every rank; ``dcp`` by its ``distributed_checkpoint`` flag."""
        saver: Any = model
        saver.save_pretrained(str(folder), is_main_process=dist.get_rank() == 0, distributed_checkpoint=layout == "dcp")

    def save_training(self, model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
        """transformers' optimizer helper; scheduler and RNG per rank as its documentation leaves to the user."""
        from transformers.distributed.checkpoint import save_optimizer_distributed

        folder.mkdir(parents=True, exist_ok=True)
        save_optimizer_distributed(model, optimizer, str(folder / "optimizer"))
        save_generators_and(scheduler, folder)

    def load_training(self, model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
        """Restore what `save_training` wrote."""
        from transformers.distributed.checkpoint import load_optimizer_distributed

        load_optimizer_distributed(model, optimizer, str(folder / "optimizer"))
        load_generators_and(scheduler, folder)


def require_accelerate() -> None:
    """Raise where ``accelerate`` is missing, before transformers does from deep inside of ``from_pretrained``.

    Raises:
        EnvironmentLacksError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise EnvironmentLacksError(
            "the transformers backend needs accelerate: from_pretrained(distributed_config=...) sets a device map, "
            "and transformers takes one only with accelerate installed. Run: pip install 'fsdp-testkit[accelerate]'"
        )


def save_generators_and(scheduler: Any, folder: Path) -> None:
    """Save this rank's generators and the scheduler: transformers leaves both to the training loop."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    state = {
        "scheduler": scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[0], [int(item) for item in numpy_state[1]], *numpy_state[2:]],
    }
    torch.save(state, folder / f"rank{dist.get_rank()}.pt")


def load_generators_and(scheduler: Any, folder: Path) -> None:
    """Restore what `save_generators_and` wrote."""
    state = torch.load(folder / f"rank{dist.get_rank()}.pt", weights_only=True)
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def translate_plan(plan: Any) -> dict[str, str] | None:
    """Return the plan in transformers' words; ``auto`` is its default plan."""
    if not isinstance(plan, dict):
        return None
    return {pattern: _STYLES[options.get("reshard_after_forward")] for pattern, options in plan["modules"].items()}


def any_option(plan: Any, name: str) -> bool:
    """Whether a rule asks for an option that transformers knows for the whole model only."""
    return isinstance(plan, dict) and any(options.get(name) for options in plan["modules"].values())
