"""DDP on real ranks: the second oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fsdp_testkit.backends.loop import TrainingLoop
from fsdp_testkit.backends.pairs import average_in_pairs
from fsdp_testkit.core.errors import InternalError
from fsdp_testkit.core.layout import Layout

#: Ranks over which a sum has one order.
ONE_ORDER = 2
#: (class, config) -> parameters that the constructor leaves untrained.
_frozen: dict[tuple[Any, str], list[str]] = {}
#: What a config says of how it was saved, and not of the model.
_OF_SAVING = frozenset(("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"))


def remember_frozen(model_class: Any, config: Any, names: list[str]) -> None:
    """Take note of the parameters that a class leaves untrained when it is built from ``config``."""
    _frozen[_key(model_class, config)] = names


def _frozen_by_constructor(model_class: Any, config: Any) -> list[str]:
    """Return the parameters that the constructor leaves untrained; where that is not known, a model is built for it."""
    if (key := _key(model_class, config)) not in _frozen:
        with torch.device("meta"):
            fresh = model_class(config)
        _frozen[key] = [name for name, parameter in fresh.named_parameters() if not parameter.requires_grad]
    return _frozen[key]


def _key(model_class: Any, config: Any) -> tuple[Any, str]:
    return model_class, json.dumps(_shape_of(config.to_dict()), sort_keys=True, default=str)


def _shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _shape_of(item) for name, item in value.items() if name not in _OF_SAVING}
    return [_shape_of(item) for item in value] if isinstance(value, list | tuple) else value


class DDPBackend(TrainingLoop):
    """A full model on every rank, gradients averaged by ``DistributedDataParallel``."""

    name = "ddp"
    capabilities: frozenset[str] = frozenset()

    def load(
        self,
        checkpoint: Path,
        *,
        model_class: type[nn.Module],
        layout: Layout,
        plan: Any,
        dtype: torch.dtype,
    ) -> nn.Module:
        """Load the whole checkpoint with plain ``from_pretrained`` on each rank and wrap it."""
        del plan
        loader: Any = model_class
        model = loader.from_pretrained(str(checkpoint), dtype=dtype)
        # plain from_pretrained of transformers 5.23 loses a constructor's requires_grad=False
        for name in _frozen_by_constructor(loader, model.config):
            model.get_parameter(name).requires_grad_(False)
        if layout.device == "cuda":
            model = model.to("cuda")
        # unused parameters (towers, cross attention, top-k indexers) are normal in text-only steps
        # reversible blocks run a backward inside of backward, which DDP takes in a static graph only
        static = any(hasattr(module, "backward_pass") for module in model.modules())
        wrapped = DistributedDataParallel(model, find_unused_parameters=not static, static_graph=static)
        if dist.get_world_size() > ONE_ORDER:
            wrapped.register_comm_hook(None, average_in_pairs)
        return wrapped

    def save(self, model: nn.Module, folder: Path, *, layout: str) -> None:
        """Not offered: the oracle saves nothing."""
        raise InternalError("the DDP oracle saves nothing")

    def save_training(self, model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
        """Not offered: the oracle saves nothing."""
        raise InternalError("the DDP oracle saves nothing")

    def load_training(self, model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
        """Not offered: the oracle saves nothing."""
        raise InternalError("the DDP oracle saves nothing")
