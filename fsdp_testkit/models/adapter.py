"""The only place that touches private names of transformers. Written against transformers 5.23.

`tests/models/test_adapter.py` fails with the name when one of them moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models.catalogue import causal_lm_types, near_matches

#: The release that the private names below were checked with.
CHECKED_WITH = "5.23"


def config_class(model_type: str) -> Any:
    """Return the config class of ``model_type``.

    Raises:
        UsageError: the type is not a causal LM of the installed transformers.
    """
    if model_type not in causal_lm_types():
        raise UsageError(f"model_type={model_type!r} must be a causal-LM model type; near: {near_matches(model_type)}")
    return CONFIG_MAPPING[model_type]


def any_config_class(model_type: str) -> Any:
    """Return the config class of any model type, causal LM or not (sub-configs need it)."""
    return CONFIG_MAPPING[model_type]


def causal_lm_class(config: Any) -> Any:
    """Return the class that the causal-LM mapping gives for a config, or ``None``."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def part_for(config: Any, model_class: Any) -> Any:
    """Return the config, or the sub-config of it that the class is made for (a text model of a composite)."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, wanted)), config)


def sub_config_specs(config_type: Any) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Return sub-config name -> (config class, keyword arguments of its default, whether it may be None)."""
    result = {}
    for name, spec in config_type.sub_configs_defaults.items():
        concrete = spec.config_class
        if not hasattr(concrete, "default_config_fields"):  # AutoConfig: the model type decides
            concrete = spec.get_config_class(spec.model_type)
        result[name] = (concrete, dict(spec.init_kwargs), bool(spec.optional))
    return result


def keeps_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return the test of names that ``from_pretrained(dtype=...)`` would keep in float32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda _: False
    pattern, _, _ = build_glob_alternation(list(plan))
    return lambda name: pattern.search(name) is not None


def initialize_over(model: Any) -> None:
    """Run the model's own initialisation as a load does after all values of a checkpoint are in place.

    What goes through ``transformers.initialization`` leaves such values alone. A plain assignment overwrites them,
    so a model that makes one is never what its checkpoint says.
    """
    if not hasattr(model, "initialize_weights"):  # somebody's own model
        return
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def tied_keys(model: Any) -> dict[str, str]:
    """Return tied parameter name -> name of the parameter that it is the same as."""
    return dict(model.all_tied_weights_keys)
