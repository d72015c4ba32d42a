"""Where a rule does not fit a model type: the values that do, and why.

Values are keyword arguments of the config class; a dict for a sub-config is an override of that sub-config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Override:
    """Values for one model type, and why its fields do not follow the rules."""

    why: str
    values: dict[str, Any] = field(default_factory=dict)
    #: ``module:QualName`` where the causal-LM mapping gives no class that works.
    model_class: str = ""
    #: Name of the sub-config that the model takes instead of the whole.
    config_part: str = ""
    #: Further forward inputs: (config, model class, batch size, length, generator) -> tensors.
    inputs: Callable[..., dict[str, Any]] | None = None


OVERRIDES: dict[str, Override] = {
    "lfm2": Override(
        "layer_types is derived from full_attn_idxs, whose default has no convolution at all",
        {
            "layer_types": ["conv", "full_attention"],
            "num_hidden_layers": 2,
            "block_auto_adjust_ff_dim": False,
        },
    ),
}
