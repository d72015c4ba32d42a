from __future__ import annotations

import pytest
import small
import torch
from torch import nn

from fsdp_testkit.reference import ModuleOptions, Plan, PlanError
from fsdp_testkit.reference.units import block_lists, resolve


def shape(plan: object, model: nn.Module) -> list[tuple[tuple[str, ...], bool | None]]:
    return [(unit.modules, unit.options.reshard_after_forward) for unit in resolve(Plan.parse(plan), model)]


def test_auto_untied() -> None:
    assert shape("auto", small.build("llama")) == [
        (("model.embed_tokens",), True),
        (("model.layers.0",), True),
        (("model.layers.1",), True),
        (("model.norm", "lm_head"), False),
        (("",), None),
    ]


def test_auto_tied_puts_embedding_and_head_in_one_unit() -> None:
    units = shape("auto", small.build("gpt2", tie=True))
    assert (("transformer.wte", "transformer.ln_f", "lm_head"), False) in units
    assert units[-1] == (("",), None)


def test_single_block_is_found_and_nested_experts_are_not() -> None:
    assert block_lists(small.build("llama", layers=1)) == ["model.layers"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.once = nn.ModuleList([nn.Linear(2, 2)])
    assert block_lists(model) == ["layers"]


def test_manual_merges_ties_and_leaves_the_rest_to_the_root() -> None:
    plan = {"model.layers.*": "free_full_weight", "model.embed_tokens": ["keep_full_weight"]}
    assert shape(plan, small.build("llama", tie=True)) == [
        (("model.embed_tokens", "lm_head"), False),
        (("model.layers.0",), True),
        (("model.layers.1",), True),
        (("",), None),
    ]


def test_children_come_before_parents() -> None:
    plan = {"mode": "manual", "modules": {"model": {}, "model.layers.*": {}, "model.layers.*.mlp": {}}}
    order = [modules[0] for modules, _ in shape(plan, small.build("llama"))]
    assert order.index("model.layers.0.mlp") < order.index("model.layers.0") < order.index("model")


def test_other_dtype_becomes_a_unit_of_its_own() -> None:
    model = small.build("llama").to(torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    units = resolve(Plan(), model)
    assert [u.modules for u in units][:1] == [("model.embed_tokens",)]
    assert ("model.layers.0.input_layernorm",) in [u.modules for u in units]
    for unit in units:
        taken = {p for other in units[: units.index(unit)] for m in other.modules for p in parameters(model, m)}
        assert len({p.dtype for m in unit.modules for p in parameters(model, m) if p not in taken}) <= 1


def parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(model.get_submodule(name).parameters())


def test_dtype_of_a_unit_is_that_of_its_own_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).float())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    for block in model.layers:
        block.inner[0].bfloat16()
    units = [unit.modules for unit in resolve(Plan(), model)]
    assert units == [
        ("layers.0.inner.0",),
        ("layers.1.inner.0",),
        ("layers.0",),
        ("layers.1",),
        ("",),
    ]


def test_final_norm_of_another_dtype_leaves_the_head() -> None:
    model = small.build("llama").to(torch.bfloat16)
    model.model.norm.float()
    units = [unit.modules for unit in resolve(Plan(), model)]
    assert ("model.norm",) in units
    assert ("lm_head",) in units


def test_parse_forms() -> None:
    options = ModuleOptions(reshard_after_forward=True, cpu_offload=True)
    plan = Plan(mode="manual", modules={"a.*": options})
    assert Plan.parse(plan) is plan
    assert Plan.parse({"a.*": ["free_full_weight", "cpu_offload"]}) == plan
    kit = {"mode": "manual", "modules": {"a.*": {"reshard_after_forward": True, "cpu_offload": True}}}
    assert Plan.parse(kit) == plan
    assert Plan.parse({"mode": "auto"}) == Plan.parse("auto") == Plan()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("automatic", "plan='automatic' must be"),
        (3, "plan=3 must be"),
        ({}, "names no module"),
        ({"mode": "semi"}, "mode='semi'"),
        ({"mode": "auto", "modules": {"a": {}}}, "takes no modules"),
        ({"mode": "manual", "units": {}}, r"unknown keys \['units'\]"),
        ({"a": "free"}, "pattern 'a': option 'free' is unknown"),
        ({"a": ["free_full_weight", "keep_full_weight"]}, "contradict"),
        ({"mode": "manual", "modules": {"a": {"reshard": True}}}, r"options \['reshard'\] are unknown"),
        ({"a": {"reshard_after_forward": 2}}, "reshard_after_forward=2"),
        ({"a": {"mixed_precision": "int8"}}, "mixed_precision='int8'"),
        ({"a..b": {}}, r"pattern 'a\.\.b'"),
    ],
)
def test_malformed_plans(value: object, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Plan.parse(value)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ({"model.layer.*": {}}, r"'model\.layer\.\*' matches no module of LlamaForCausalLM; near: model\.layers\.\*"),
        ({"model.layers": {}}, r"container 'model\.layers'; use 'model\.layers\.\*'"),
        ({"model.rotary_emb": {}}, "matches only modules without parameters"),
        ({"model.layers.*": {}, "model.layers.0": {"cpu_offload": True}}, "different options"),
    ],
)
def test_patterns_that_do_not_fit(modules: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        resolve(Plan.parse({"mode": "manual", "modules": modules}), small.build("llama"))


def test_tied_modules_need_the_same_options() -> None:
    plan = Plan.parse({"lm_head": "cpu_offload", "model.embed_tokens": "free_full_weight"})
    with pytest.raises(PlanError, match="share parameters"):
        resolve(plan, small.build("llama", tie=True))


def test_options_of_all_units_and_what_stays_in_fp32() -> None:
    model = small.build("llama")
    model._keep_in_fp32_modules_strict = {"q_proj"}
    options = {"mixed_precision": "bfloat16", "cpu_offload": True}
    units = resolve(Plan.parse({"mode": "auto", "options": options}), model)
    assert all(unit.options.cpu_offload for unit in units)
    kept = [unit.modules for unit in units if unit.options.mixed_precision is None]
    assert kept == [(f"model.layers.{index}.self_attn.q_proj",) for index in (0, 1)]
    rest = [(modules, style) for modules, style in shape({"mode": "auto", "options": options}, model)]
    plain = shape("auto", small.build("llama"))
    assert {unit for unit in rest if unit[0] not in kept} == set(plain)


def test_an_option_of_a_module_goes_before_that_of_all() -> None:
    plan = {"modules": {"model.layers.*": {"mixed_precision": "float16"}}, "options": {"mixed_precision": "bfloat16"}}
    found = {unit.options.mixed_precision for unit in resolve(Plan.parse(plan), small.build("llama"))}
    assert found == {"float16", "bfloat16"}
    with pytest.raises(PlanError, match="must leave reshard_after_forward"):
        Plan.parse({"options": {"reshard_after_forward": True}})
