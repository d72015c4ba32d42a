"""The Backend protocol: one implementation under test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch import nn

    from fsdp_testkit.core.layout import Layout

#: Everything that a backend may be able to express. What is missing is counted as not applicable.
CAPABILITIES = frozenset(
    {
        "auto_plan",  # finds a plan by itself
        "manual_plan",  # takes {pattern: options}
        "reshard_per_module",  # reshard after forward may differ between modules
        "hsdp",  # replicate x shard meshes
        "safetensors",  # saves standard safetensors
        "dcp",  # saves torch.distributed.checkpoint folders and reshards on load
        "resume",  # save_training / load_training
        "meta_init",  # claims that no rank builds or initialises a full model in vain
        "fake",  # loads under a fake process group
        # features: what `Features` has a field for
        "cpu_offload",
        "mixed_precision",
        "activation_checkpointing",
        "gradient_sync",
        "nonfinite_guard",
    }
)
#: What a backend may promise beside, and no test needs. ``regroup``: nothing of a process group is kept beyond a load,
#: so that a process may leave its group and load in another one. Tests are then run in fewer processes.
PROMISES = frozenset({"regroup"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward/backward of one rank.

    Attributes:
        inputs: keyword arguments of the model's forward, labels included.
        tokens: number of label positions that the model's own mean loss averages over.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a training step reports.

    Attributes:
        losses: this rank's own mean loss of each micro-batch, before any normalisation.
        grad_norm: total 2-norm of the gradient over all ranks, before clipping.
    """

    losses: list[float]
    grad_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW whose tensors of 2 or more dims decay, the others do not; each block of the model has groups of its own.

    Attributes:
        lr: learning rate of the decaying tensors; the others take half of it.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: of the decaying tensors.
        split: number of sets that trainable parameters are dealt to in turn, in the order of ``named_parameters``;
            set ``k`` has groups of its own, with the learning rates times ``0.5 ** k``.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    # large against the rounding of a gradient, so that Adam does not amplify it
    eps: float = 1e-4
    weight_decay: float = 0.1
    split: int = 1


#: A block is a module called by a number, outside any other such module: ``model.layers.0``.
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return two groups over trainable parameters for each set of ``config.split`` and each block of the model.

    Groups are in the order of their first parameters' sets and blocks, what lies in no block counts as one, and an
    empty group is left out. Blocks of one shape are equal calls of the optimizer to DTensor, which works out each
    kind of call once in a process, in milliseconds for each tensor: a fifth of the CPU time of short trainings.
    """
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for index in range(config.split):
        lr = config.lr * 0.5**index
        blocks: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in trainable[index :: config.split]:
            block = _BLOCK.match(name)
            blocks.setdefault(block.group() if block else "", []).append(parameter)
        for dealt in blocks.values():
            decay = [parameter for parameter in dealt if parameter.ndim >= 2]
            plain = [parameter for parameter in dealt if parameter.ndim < 2]
            groups.append({"params": decay, "weight_decay": config.weight_decay, "lr": lr})
            groups.append({"params": plain, "weight_decay": 0.0, "lr": lr * 0.5})
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a case asks of a backend beyond layout and plan; the defaults ask for nothing.

    Attributes:
        activation_checkpointing: blocks run their forward again in backward, with the same random numbers.
        mixed_precision: ``""``, or the dtype in which all units compute, ``"bfloat16"``: inputs and gathered
            parameters are cast to it, gradients are reduced in fp32 and have the parameter's dtype. Modules that
            the model keeps in fp32 (``_keep_in_fp32_modules``) compute in fp32.
        cpu_offload: parameters, gradients and optimizer state stay in CPU memory.
        reduce_each: gradients are reduced in each micro-batch and summed as shards, instead of once in the last
            one (capability ``gradient_sync``).
        refuse_nonfinite: a step whose gradient is not finite on any rank raises on every rank, before the optimizer
            moves anything (capability ``nonfinite_guard``).
    """

    activation_checkpointing: bool = False
    mixed_precision: str = ""
    cpu_offload: bool = False
    reduce_each: bool = False
    refuse_nonfinite: bool = False

    def __bool__(self) -> bool:
        return self != Features()


NO_FEATURES = Features()


@runtime_checkable
class Backend(Protocol):
    """An implementation under test. Instances live on one rank, inside a job's process group."""

    name: str
    capabilities: frozenset[str]

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
        """Load and shard a checkpoint folder (safetensors, or a DCP folder if `dcp`) on the layout's mesh.

        ``features`` is given where a case asks for one: a backend without such capabilities need not take it.
        What concerns `train_step` (``reduce_each``) the backend keeps until then.

        ``plan`` is ``"auto"`` or the kit's plan dict ``{"mode": "manual", "modules": {pattern: options}}``
        with options ``reshard_after_forward``, ``cpu_offload``, ``mixed_precision``.
        """
        ...

    def make_optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters in the groups of `parameter_groups`."""
        ...

    def train_step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[MicroBatch],
        normaliser: str,
        max_norm: float,
    ) -> StepOutput:
        """Run forward, backward, clipping and the optimizer step, and clear the gradients."""
        ...

    def save(self, model: nn.Module, folder: Path, *, layout: str) -> None:
        """Save weights as ``"safetensors"`` (plain ``from_pretrained`` reads it) or ``"dcp"``."""
        ...

    def save_training(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
        """Save optimizer, scheduler and RNG state of every rank beside the weights."""
        ...

    def load_training(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
        """Restore what `save_training` wrote, in place."""
        ...
