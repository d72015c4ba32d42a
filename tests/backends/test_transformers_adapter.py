"""The adapter of transformers' own FSDP2: its helpers are where it looks for them, its plan is in their words."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fsdp_testkit.backends.base import CAPABILITIES, Backend
from fsdp_testkit.backends.registry import make_backend
from fsdp_testkit.backends.transformers import TransformersBackend, any_option, translate_plan
from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.models.plans import manual_plan
from fsdp_testkit.models.tree import module_tree

MOVED = "transformers moved it: follow it in fsdp_testkit/backends/transformers.py and name the version there"


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_is_the_backend_called_transformers() -> None:
    backend = make_backend("transformers")
    assert isinstance(backend, TransformersBackend)
    assert isinstance(backend, Backend)
    assert backend.capabilities <= CAPABILITIES


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        ("transformers.distributed.checkpoint", "save_optimizer_distributed", ["model", "optimizer", "checkpoint_dir"]),
        ("transformers.distributed.checkpoint", "load_optimizer_distributed", ["model", "optimizer", "checkpoint_dir"]),
    ],
)
def test_helpers_are_where_the_adapter_takes_them_from(module: str, name: str, parameters: list[str]) -> None:
    helper = getattr(importlib.import_module(module), name, None)
    assert callable(helper), f"{module}.{name} is gone. {MOVED}"
    assert list(inspect.signature(helper).parameters) == parameters, MOVED


def test_distributed_config_has_the_fields_that_the_adapter_sets() -> None:
    from transformers.distributed import DistributedConfig

    fields = {field.name for field in dataclasses.fields(DistributedConfig)}
    used = {"fsdp_size", "dp_replicate_size", "fsdp_plan", "fsdp_cpu_offload", "fsdp_mixed_precision"}
    assert used <= fields, f"{sorted(used - fields)}: {MOVED}"
    config = DistributedConfig(fsdp_size=2, dp_replicate_size=3)
    assert (config.fsdp_size, config.dp_replicate_size, config.dp_size) == (2, 3, 6)
    assert (config.tp_size, config.pp_size, config.ep_size) == (1, 1, 1)


def test_save_pretrained_takes_the_arguments_of_the_adapter() -> None:
    parameters = inspect.signature(LlamaForCausalLM.save_pretrained).parameters
    assert {"save_directory", "is_main_process", "distributed_checkpoint"} <= parameters.keys(), MOVED


def test_from_pretrained_knows_the_distributed_config() -> None:
    source = inspect.getsource(LlamaForCausalLM.from_pretrained)
    assert "distributed_config" in source, MOVED


def test_plan_styles_are_transformers_words() -> None:
    from transformers.distributed.fsdp import ALL_FSDP_STYLES

    plan = {
        "modules": {
            name: {"reshard_after_forward": flag} for name, flag in zip("abc", (True, False, None), strict=True)
        }
    }
    translated = translate_plan(plan)
    assert translated == {"a": "free_full_weight", "b": "keep_full_weight", "c": "free_full_weight"}
    assert set(translated.values()) == set(ALL_FSDP_STYLES), MOVED


def test_the_auto_plan_is_transformers_default() -> None:
    from transformers.distributed import DistributedConfig

    assert translate_plan("auto") is None
    model = small_llama()
    _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, fsdp_plan=translate_plan("auto")))
    assert plan["model.layers.0"] == "free_full_weight"
    assert plan["lm_head"] == "keep_full_weight"


def test_the_manual_plan_reaches_every_module_that_it_names() -> None:
    from transformers.distributed import DistributedConfig

    model = small_llama()
    manual = manual_plan(module_tree(model))
    rules = translate_plan(manual)
    assert rules is not None
    assert len(rules) == len(manual["modules"])
    _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, fsdp_plan=rules))
    for pattern, style in rules.items():
        names = [pattern.replace("*", str(index)) for index in range(2)] if "*" in pattern else [pattern]
        assert {name: plan.get(name) for name in names} == dict.fromkeys(names, style)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("auto", False),
        ({"modules": {}}, False),
        ({"modules": {"a": {"cpu_offload": False}}}, False),
        ({"modules": {"a": {}, "b": {"cpu_offload": True}}}, True),
    ],
)
def test_options_of_the_whole_model(plan: object, expected: bool) -> None:
    assert any_option(plan, "cpu_offload") is expected
    assert any_option(plan, "mixed_precision") is False


def test_says_that_accelerate_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'fsdp-testkit\[accelerate\]'"):
        TransformersBackend().load(
            tmp_path, model_class=LlamaForCausalLM, layout=Layout.parse("fsdp(2)"), plan="auto", dtype=torch.float32
        )
