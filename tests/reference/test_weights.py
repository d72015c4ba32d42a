"""Conversions: every way of making some rows gives the rows of the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import core_model_loading as core

from fsdp_testkit.reference import adapter, plainjson
from fsdp_testkit.reference.errors import TrainingStateError
from fsdp_testkit.reference.files import Checkpoint
from fsdp_testkit.reference.weights import GroupReader, match


class Model(nn.Module):
    base_model_prefix = "model"
    config = SimpleNamespace(num_attention_heads=2)

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    def _adjust_missing_and_unexpected_keys(self, info: Any) -> None:
        pass


CASES: dict[str, tuple[dict[str, tuple[int, ...]], list[Any], dict[str, tuple[int, ...]], str]] = {
    "fused projections split": (
        {"qkv": (12, 5)},
        [core.WeightConverter("qkv", ["q", "k", "v"], [core.Chunk(0)])],
        {"q": (4, 5), "k": (4, 5), "v": (4, 5)},
        "permuted",
    ),
    "projections fused": (
        {"gate": (6, 5), "up": (6, 5)},
        [core.WeightConverter(["gate", "up"], "gate_up", [core.Concatenate(0)])],
        {"gate_up": (12, 5)},
        "permuted",
    ),
    "rope permuted": (
        {"wq": (8, 5)},
        [core.WeightConverter("wq", "q", [core.PermuteForRope()])],
        {"q": (8, 5)},
        "permuted",
    ),
    "interleaved and split along dim 1": (
        {"w13": (3, 8, 5)},
        [core.WeightConverter("w13", ["gate", "up"], [core.Interleave(1), core.Chunk(1)])],
        {"gate": (3, 4, 5), "up": (3, 4, 5)},
        "aligned",
    ),
    "experts transposed": (
        {"experts": (3, 4, 6)},
        [core.WeightConverter("experts", "fused", [core.Transpose(1, 2)])],
        {"fused": (3, 6, 4)},
        "aligned",
    ),
    "experts stacked and fused": (
        {f"e.{i}.{w}": (4, 6) for i in range(11) for w in ("w1", "w3")},
        [core.WeightConverter(["e.*.w1", "e.*.w3"], "fused", [core.MergeModulelist(0), core.Concatenate(1)])],
        {"fused": (11, 8, 6)},
        "piled",
    ),
    "transposed": (
        {"kernel": (4, 6)},
        [core.WeightConverter("kernel", "weight", [core.Transpose(0, 1)])],
        {"weight": (6, 4)},
        "full",
    ),
    "stacked along dim 1": (
        {f"e.{i}.w": (4, 6) for i in range(3)},
        [core.WeightConverter("e.*.w", "fused", [core.MergeModulelist(1)])],
        {"fused": (4, 3, 6)},
        "full",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_rows_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    shapes, transforms, targets, strategy = CASES[case]
    monkeypatch.setattr(adapter, "conversions", lambda _: transforms)
    torch.manual_seed(0)
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "model.safetensors")
    checkpoint, model = Checkpoint(tmp_path), Model(**targets)
    weights = match(checkpoint, model)
    assert weights.problems == []
    (group,) = weights.groups
    assert group.strategy == strategy
    full = group.convert([(pattern, checkpoint.full(key)) for pattern, key in group.sources], model)
    for target, shape in targets.items():
        assert tuple(full[target].shape) == shape
        for start in range(shape[0] + 1):
            for stop in range(start, shape[0] + 1):
                out = torch.full((stop - start, *shape[1:]), torch.nan)
                checkpoint.bytes_read = 0
                GroupReader(group, checkpoint, model).read_into(out, target, start)
                assert torch.equal(out, full[target][start:stop])
                if strategy in ("permuted", "stacked"):
                    assert checkpoint.bytes_read == out.nbytes
                elif strategy == "aligned":
                    assert checkpoint.bytes_read == out.nbytes * len(targets)


def test_plain_values_survive_json() -> None:
    import json

    value = {1: (2, [3.5, None, float("inf")]), "a": {"b": True}, ("x", 2): torch.float32, "t": (1, (2,))}
    assert plainjson.decode(json.loads(json.dumps(plainjson.encode(value)))) == value
    tensor = torch.tensor([1.5, -0.0], dtype=torch.float64)
    again = plainjson.decode(json.loads(json.dumps(plainjson.encode(tensor))))
    assert torch.equal(tensor, again)
    assert again.dtype == tensor.dtype
    with pytest.raises(TrainingStateError, match="not a plain value"):
        plainjson.encode(object())
    with pytest.raises(TrainingStateError, match="names no dtype"):
        plainjson.decode({"__kind__": "dtype", "value": "torch.load"})
    with pytest.raises(TrainingStateError, match="not a saved value"):
        plainjson.decode({"kind": 1})
