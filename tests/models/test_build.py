from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import tiny
from fsdp_testkit.models.batches import make_batch
from fsdp_testkit.models.build import build_model, default_variant, meta_model, resolve, spec_from_file, warm_modules
from fsdp_testkit.models.family import family
from fsdp_testkit.models.rules import Fields


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    vocab_size: int = 61
    hidden_size: int = 12
    dropout: float = 0.1


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> Any:
        logits = self.head(self.embed(input_ids)) * scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @staticmethod
    def fsdp_testkit_inputs(_config: Any, inputs: Any, _generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"scale": torch.ones(inputs["input_ids"].shape[0], 1, 1)}


OWN = ModelSpec(
    model_type="own",
    config=json.dumps({"vocab_size": 61, "hidden_size": 12, "dropout": 0.1}),
    config_class=f"{__name__}:OwnConfig",
    model_class=f"{__name__}:OwnModel",
    dropout=0.25,
)


def test_a_model_of_ones_own() -> None:
    model: Any = build_model(OWN, seed=0)
    assert isinstance(model, OwnModel)
    assert model.config.dropout == 0.25
    batch = make_batch(model.config, type(model), rank=0, step=0, micro=0, seed=0)
    assert int(batch.inputs["input_ids"].max()) < 61
    assert torch.isfinite(model(**batch.inputs))


def test_a_config_file_of_ones_own(tmp_path: Path) -> None:
    config, _ = resolve(ModelSpec(model_type="mixtral"))
    config.save_pretrained(tmp_path)
    spec = spec_from_file(tmp_path / "config.json", tie=True)
    assert spec.model_type == "mixtral"
    first = dict(build_model(spec, seed=0).named_parameters())
    second = dict(build_model(ModelSpec(model_type="mixtral", tie=True), seed=0).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "lama"}'])
def test_a_config_file_without_a_causal_lm_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="mod"):
        spec_from_file(path)


def test_bad_class_names_are_refused() -> None:
    for name in ("nowhere", "nowhere:Config", f"{__name__}:Nothing"):
        with pytest.raises(UsageError, match="module:QualName"):
            resolve(dataclasses.replace(OWN, config_class=name))
    with pytest.raises(UsageError, match="model_class"):
        resolve(dataclasses.replace(OWN, model_class=""))


def test_building_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    build_model(ModelSpec(model_type="llama"), seed=0, dtype=torch.bfloat16)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert torch.get_default_dtype() == torch.float32


def test_seeds_give_different_weights_and_no_weight_is_a_one_or_a_zero() -> None:
    first, second = (dict(build_model(ModelSpec(model_type="phi"), seed=seed).named_parameters()) for seed in (0, 1))
    for key, value in first.items():
        assert not torch.equal(value, second[key])
        assert not ((value == 0) | (value == 1)).any(), key


def test_a_size_without_a_rule_says_what_to_add() -> None:
    with pytest.raises(UsageError, match=r"NewConfig\.frobnication_width=640 .*rules\.py.*overrides\.py"):
        tiny.decide("NewConfig", "frobnication_width", 640, Fields({}), 0.0)


def test_the_shared_block_of_a_hybrid_stays_shared() -> None:
    model = build_model(ModelSpec(model_type="zamba"), seed=0)
    names = [name for name, _ in model.named_parameters() if "shared_transf" in name]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False) if "shared_transf" in name]
    assert len(every) == 2 * len(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "dense"),
        ("gpt2", "dense"),
        ("mixtral", "moe"),
        ("gpt_oss", "moe"),
        ("lfm2", "hybrid"),
        ("qwen3_5_text", "hybrid"),
        ("bart", "decoder"),
        ("bert", "decoder"),
        ("gemma3", "multimodal"),
        ("mamba", "other"),
        ("recurrent_gemma", "hybrid"),
        ("bamba", "hybrid"),
        ("seed_oss", "dense"),
        ("gpt_neox", "dense"),
        ("rwkv", "other"),
    ],
)
def test_family(name: str, expected: str) -> None:
    assert family(meta_model(ModelSpec(model_type=name))) == expected


def test_default_variants_and_modules_to_warm() -> None:
    assert default_variant("llama") == "untied"
    assert default_variant("gpt2") == "tied"
    assert warm_modules(["llama", "modernbert-decoder", "own"]) == [
        "transformers.models.llama.modeling_llama",
        "transformers.models.modernbert_decoder.modeling_modernbert_decoder",
    ]
