"""Low-rank adapters in any causal LM: what is trained beside frozen weights.

A linear layer gets two small ones beside it, as in LoRA (https://arxiv.org/abs/2106.09685): its output becomes
``W x + B A x``. The layer keeps its class and its names, so that checkpoints of the plain model still match; the
new ones are called ``adapter_a`` and ``adapter_b``. They are made in the model's constructor, which is where a
loader that builds on meta finds them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from fsdp_testkit.models.tree import find_blocks

#: Numbers of rows of the ``A`` matrices, dealt to layers in turn. On three ranks they are 1, w - 1, w and w + 1:
#: ranks without a row, ranks with one, and a last rank with fewer than the others.
ROWS = (1, 2, 3, 4)


@cache
def adapted(model_class: Any) -> Any:
    """Return a subclass of a model class whose blocks have adapters; the same one for the same class."""

    class Adapted(model_class):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            insert(self)

    # loaders look classes up by name, and transformers takes what lies elsewhere for somebody's own code
    Adapted.__name__, Adapted.__qualname__ = model_class.__name__, model_class.__qualname__
    Adapted.__module__ = model_class.__module__
    return Adapted


def insert(model: nn.Module) -> None:
    """Give the first and the last linear layer of each block an adapter, in place."""
    number = 0
    for block in find_blocks(model):
        layers = [layer for layer in model.get_submodule(block).modules() if sizes(layer) is not None]
        for layer in dict.fromkeys([*layers[:1], *layers[-1:]]):
            fan_in, fan_out = sizes(layer) or (0, 0)
            rows = ROWS[number % len(ROWS)]
            dtype = next(layer.parameters()).dtype
            layer.adapter_a = nn.Linear(fan_in, rows, bias=False, dtype=dtype)
            layer.adapter_b = nn.Linear(rows, fan_out, bias=False, dtype=dtype)
            kind: Any = type(layer)
            layer.__class__ = _with_adapter(kind)
            number += 1


def sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a plain linear layer, ``None`` for any other module."""
    if type(layer) is nn.Linear:
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2's: a linear layer, weight transposed
        weight: Any = layer.weight
        return int(weight.shape[0]), int(weight.shape[1])
    return None


@cache
def _with_adapter(kind: Any) -> Any:
    class WithAdapter(kind):  # type: ignore[misc]  # the base is known at run time only
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = super().forward(inputs) + self.adapter_b(self.adapter_a(inputs))
            return output

    WithAdapter.__name__, WithAdapter.__qualname__ = kind.__name__, kind.__qualname__
    return WithAdapter
