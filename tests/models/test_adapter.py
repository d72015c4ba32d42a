"""Private names of transformers that the kit relies on: a failure here names what has moved."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import adapter
from fsdp_testkit.models.build import meta_model


def test_the_release_is_the_one_that_was_checked() -> None:
    assert transformers.__version__.startswith(f"{adapter.CHECKED_WITH}.")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (PreTrainedModel, "_get_dtype_plan"),
        (PreTrainedModel, "_keep_in_fp32_modules_strict"),
        (PreTrainedModel, "set_experts_implementation"),
        (PreTrainedModel, "config_class"),
        (PreTrainedConfig, "sub_configs_defaults"),
        (PreTrainedConfig, "sub_configs"),
        (PreTrainedConfig, "default_config_fields"),
    ],
)
def test_the_name_exists(owner: type, name: str) -> None:
    assert inspect.getattr_static(owner, name, "missing") != "missing"


def test_float32_is_kept_where_from_pretrained_keeps_it() -> None:
    model = meta_model(ModelSpec(model_type="glm_moe_dsa"))
    kept = adapter.keeps_float32(model, torch.bfloat16)
    assert kept("model.layers.1.mlp.gate.e_score_correction_bias")
    assert not kept("model.layers.1.mlp.gate.weight")
    assert not adapter.keeps_float32(model, torch.float64)("model.layers.1.mlp.gate.e_score_correction_bias")


def test_classes_and_parts() -> None:
    assert adapter.config_class("llama") is LlamaConfig
    assert adapter.causal_lm_class(LlamaConfig()) is LlamaForCausalLM
    assert adapter.causal_lm_class(PreTrainedConfig()) is None
    whole = adapter.config_class("qwen3_5")()
    part = adapter.part_for(whole, adapter.causal_lm_class(whole))
    assert part is whole or part is whole.text_config
    with pytest.raises(UsageError, match="llama"):
        adapter.config_class("lama")
