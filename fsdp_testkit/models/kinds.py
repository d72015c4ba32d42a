"""Proof that a tiny model keeps every kind of layer of its default model."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import adapter
from fsdp_testkit.models.build import meta_model
from fsdp_testkit.models.tiny import field_defaults

#: A kind of layer: where it is (numbers replaced) and the names of its parameters.
Kind = tuple[str, frozenset[str]]


def missing_layer_kinds(model_type: str) -> list[str]:
    """Return the kinds of layers that the default model of a type has and its tiny model has not; ideally none.

    Two things are compared on the meta device: the names of the parameters of every layer, and the values of
    every per-layer list of the config (the names of two kinds of attention are often the same).

    Raises:
        UsageError: the class cannot build a model from its own defaults, so that there is nothing to compare.
    """
    default = default_model(model_type)
    tiny = meta_model(ModelSpec(model_type=model_type))
    small = layer_kinds(tiny)
    missing = [
        f"{place}: {', '.join(sorted(names)) or 'no parameters'}"
        for place, names in sorted(layer_kinds(default), key=lambda kind: (kind[0], sorted(kind[1])))
        # a layer that has everything of the default's layer and more is as good
        if not any(place == other and names <= more for other, more in small)
    ]
    values = layer_values(tiny.config)
    for name, wanted in sorted(layer_values(default.config).items()):
        if lost := wanted - values.get(name, set()):
            missing.append(f"{name}: {', '.join(sorted(lost))}")
    return missing


def default_model(model_type: str) -> Any:
    """Return the model of a type's default config, on the meta device.

    Raises:
        UsageError: the class refuses its own defaults.
    """
    try:
        config = adapter.config_class(model_type)()
        model_class = adapter.causal_lm_class(config)
        with torch.device("meta"):
            return model_class(adapter.part_for(config, model_class))
    except Exception as error:
        raise UsageError(f"model_type={model_type!r} cannot be built from its own defaults: {error}") from None


def layer_kinds(model: nn.Module) -> set[Kind]:
    """Return the kinds of the layers in all lists of modules of a model."""
    kinds: set[Kind] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            place = _unnumbered(name)
            for layer in module:
                kinds.add((place, frozenset(_unnumbered(key) for key, _ in layer.named_parameters())))
    return kinds


def layer_values(config: Any) -> dict[str, set[str]]:
    """Return the set of values of each list of words that is as long as the model is deep."""
    depth = getattr(config, "num_hidden_layers", None)
    result: dict[str, set[str]] = {}
    # derived lists are properties (jamba) or plain attributes (gpt_neo), so fields are not enough
    names = {*field_defaults(type(config)), *vars(config), "layer_types", "layers_block_type"}
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # sizes that differ between layers refuse to be read as one
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth and all(isinstance(v, str) for v in value):
            result[name] = set(value)
    return result


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
