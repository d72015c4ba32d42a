"""Notices when a name that torch or transformers do not promise has moved or changed its meaning."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import core_model_loading as core

import fsdp_testkit.reference as package
from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.build import Recorder


def test_private_names_are_used_in_the_adapter_only() -> None:
    unpromised = ("core_model_loading", "conversion_mapping", "torch.utils._", "tensor.debug")
    for path in Path(package.__file__).parent.glob("*.py"):
        if path.name == "adapter.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if any(word in n for word in unpromised)], path.name


def test_versions_are_those_it_was_seen_in() -> None:
    seen = adapter.seen_versions()
    assert seen["torch"].startswith("2.13.")
    assert seen["transformers"].startswith("5.23.")


def test_construct_and_plain_class(claim: Any) -> None:
    config = small.build("llama").config
    with torch.device("meta"):
        model = adapter.construct(type(small.build("llama")), config, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.is_meta
    before = type(model)
    fully_shard(model, mesh=claim(0, 2))
    assert type(model) is not before
    assert adapter.plain_class(model) is before
    assert adapter.plain_class(nn.Linear(1, 1)) is nn.Linear


def test_conversions_of_mixtral_and_back() -> None:
    model = small.build("mixtral")
    transforms = adapter.conversions(model)
    renamings, converters = adapter.split_transforms(transforms)
    expected = dict(model.state_dict())
    key = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    name, pattern = adapter.renamed(key, renamings, converters, model.base_model_prefix, expected)
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert pattern is not None
    assert sum(t.was_used() for t in transforms) == 2
    renamings, converters = adapter.split_transforms(adapter.reversed_conversions(model))
    back, pattern = adapter.reverse_renamed(name, renamings, converters)
    assert pattern is not None
    assert adapter.apply_renamings(back, renamings).startswith("model.layers.0.block_sparse_moe.experts.")


def test_reversed_conversions_survive_fully_shard(claim: Any) -> None:
    model = small.build("mixtral")
    before = [(type(t), t.source_patterns) for t in adapter.reversed_conversions(model)]
    fully_shard(model, mesh=claim(0, 1))
    assert [(type(t), t.source_patterns) for t in adapter.reversed_conversions(model)] == before


def test_operations_touch_the_dims_they_are_said_to() -> None:
    assert adapter.stacks_rows(core.MergeModulelist(0))
    assert not adapter.stacks_rows(core.MergeModulelist(1))
    assert adapter.changed_dims(core.Concatenate(1)) == {1}
    assert adapter.changed_dims(core.Chunk(0)) == {0}
    assert adapter.changed_dims(core.Split(0)) == {0}
    assert adapter.changed_dims(core.Interleave(2)) == {2}
    assert adapter.changed_dims(core.Transpose(1, 2)) == {1, 2}
    assert adapter.changed_dims(core.Transpose(1, 2, check_dims=True)) is None
    assert adapter.changed_dims(core.MergeModulelist(0)) is None
    assert adapter.moves_second_dim(core.Concatenate(1))
    assert not adapter.moves_second_dim(core.Concatenate(0))
    assert not adapter.moves_second_dim(core.Interleave(1))
    assert adapter.permutes_rows(core.PermuteForRope())
    assert adapter.permutes_rows(core.Concatenate(0))
    assert not adapter.permutes_rows(core.Concatenate(1))


def test_names_and_marks() -> None:
    model = small.build("llama", tie=True)
    assert adapter.tied_patterns(model) == ["lm_head.weight"]
    assert sorted(["a.10", "a.9"], key=adapter.natural_order) == ["a.9", "a.10"]
    missing, unexpected = adapter.filter_keys(model, {"lm_head.weight"}, {"model.rotary_emb.inv_freq", "x"})
    assert missing == {"lm_head.weight"}
    assert unexpected == {"x"}
    weight = nn.Parameter(torch.zeros(2, 2))
    adapter.mark_initialized(weight)
    from transformers import initialization

    assert torch.equal(initialization.ones_(weight), torch.zeros(2, 2))
    assert adapter.fp32_pattern(model, torch.bfloat16) is None


def test_recorder_replays_what_a_constructor_did() -> None:
    def make() -> dict[str, torch.Tensor]:
        base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
        view = base[1:, ::2]
        view.mul_(2)
        literal = torch.tensor([1.5, 2.5])
        several = [torch.zeros(2), torch.zeros(3)]
        torch._foreach_add_(several, 1.0)  # returns nothing
        filled = torch.empty(3).fill_(literal.sum().item())
        moved = (base + 1).to("cpu") * 2
        rows = torch.linspace(0, 1, 5, device="cpu")
        picked = [x.item() for x in torch.linspace(0, 1, 3)]
        return {
            "base": base,
            "view": view,
            "transposed": base.t(),
            "literal": literal,
            "filled": filled,
            "several": several[1],
            "moved": moved,
            "rows": rows,
            "picked": torch.tensor(picked),
            "mask": torch.tril(torch.ones(3, 3, dtype=torch.bool)).view(1, 1, 3, 3),
        }

    recorder = Recorder()
    with recorder.recording():
        recorded = make()
    for name, expected in make().items():
        value = recorder.compute(recorded[name])
        assert torch.equal(value, expected), name
        assert value.dtype == expected.dtype, name
        assert value.device.type == "cpu", name


def test_recorded_tensors_may_be_moved() -> None:
    def make() -> dict[str, torch.Tensor]:
        given = torch.zeros(4)
        first = given.view(2, 2)
        given.data = torch.arange(4.0)
        buffer = nn.Buffer(torch.ones(3))
        buffer.data = torch.full((3,), 7.0)
        put = torch.zeros(2)
        put.set_(torch.full((2,), 5.0))
        turned = torch.arange(6.0).view(2, 3)
        added = turned + 1
        turned.t_()
        return {
            "given": given,
            "its first storage": first,
            "buffer": buffer,
            "put": put,
            "turned": turned,
            "added": added,
            "after": turned * 2,
            "sum": given + 1,
        }

    recorder = Recorder()
    with recorder.recording():
        recorded = make()
    for name, expected in make().items():
        assert torch.equal(recorder.compute(recorded[name]), expected), name


def test_a_recorded_initialisation_is_run_for_values_alone() -> None:
    def make() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        layer = nn.Linear(3, 5)
        table = nn.Embedding(4, 2)
        by_name = torch.empty(3)
        nn.init.constant_(tensor=by_name, val=2.0)
        later = layer.weight.detach() * 2
        nn.init.zeros_(layer.bias)
        return {"weight": layer.weight, "table": table.weight, "by name": by_name, "later": later, "bias": layer.bias}

    recorder = Recorder()
    with recorder.recording():
        recorded = make()
    expected = make()
    for name in ("weight", "by name", "later", "bias"):
        torch.manual_seed(3)
        assert torch.equal(recorder.compute(recorded[name]), expected[name]), name
    # its draws come after the layer's in the constructor, and alone in a replay: another value of the same kind
    value = recorder.compute(recorded["table"])
    assert value.isfinite().all()
    assert 0.1 < float(value.detach().std()) < 4


def test_what_nothing_fills_is_not_computed() -> None:
    """On meta some functions of ``torch.nn.init`` return at once: their values cannot be had from a record."""
    recorder = Recorder()
    with recorder.recording():
        bare = nn.Parameter(torch.empty(3))
        late = torch.empty(3)
        truncated = nn.init.trunc_normal_(torch.empty(4))
        view = torch.empty(2, 2).view(4)
        none = torch.empty(0)
        late.view(3)[:].copy_(torch.ones(3))
    for tensor in (bare, truncated, view):
        with pytest.raises(LookupError, match="nothing in the record gives this tensor a value"):
            recorder.compute(tensor)
    assert torch.equal(recorder.compute(late), torch.ones(3))
    assert recorder.compute(none).shape == (0,)


def test_forget_meshes(claim: Any) -> None:
    for rank in (0, 1):
        mesh = claim(rank, 2)
        adapter.forget_meshes()
        model = fully_shard(nn.Linear(4, 4), mesh=mesh)
        assert model.weight.device_mesh is mesh
