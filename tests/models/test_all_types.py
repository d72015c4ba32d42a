"""Every causal-LM type of the installed transformers is accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models.batches import make_batch
from fsdp_testkit.models.build import build_model, effective_tie, meta_model, tied_groups
from fsdp_testkit.models.catalogue import IMPOSSIBLE, causal_lm_classes, causal_lm_types
from fsdp_testkit.models.expectations import (
    UNREPEATABLE_DROPOUT,
    expects_no_gradient,
    expects_zero_gradient,
    runs_in,
)
from fsdp_testkit.models.families import FAMILY_NAMES, family_of
from fsdp_testkit.models.family import family
from fsdp_testkit.models.kinds import missing_layer_kinds
from fsdp_testkit.models.overrides import OVERRIDES
from fsdp_testkit.models.tiny import tiny_config

POSSIBLE = tuple(name for name in causal_lm_types() if name not in IMPOSSIBLE)
#: Classes that cannot build a model from their own defaults: their tiny configs follow the config's source.
NO_DEFAULT = {
    "cohere_compass_text",
    "dbrx",
    "dots1",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "ministral",
    "nemotron",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
}
#: ``tie_word_embeddings=True`` does nothing, or is refused (dbrx).
IGNORES_TIE = {
    "bailing_hybrid",
    "bigbird_pegasus",
    "cpmant",
    "dbrx",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "mllama",
    "moshi",
    "musicgen",
    "musicgen_melody",
    "nemotron_h",
    "reformer",
    "rembert",
    "xlstm",
}
#: Sub-configs whose model type is no causal LM of its own; they have batches of their own kind.
PARTS = {"musicgen_decoder", "musicgen_melody_decoder"}


def test_every_type_is_accounted_for() -> None:
    assert len(causal_lm_types()) == 189
    assert len(POSSIBLE) == 186
    assert len(IMPOSSIBLE) <= 3
    assert not IMPOSSIBLE.keys() - set(causal_lm_types())
    assert not OVERRIDES.keys() - set(causal_lm_types()) - PARTS


@pytest.mark.parametrize("name", sorted(IMPOSSIBLE))
def test_impossible_types_say_why(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        tiny_config(name)


#: Their fused weights have slices that no token ever uses: experts that pass their input through.
UNUSED_SLICES = {"longcat_flash": 3}
#: One expert for each token instead of two: it takes more batches until all have been reached.
ONE_EXPERT = {"zaya"}


@pytest.mark.parametrize("name", POSSIBLE)
def test_type(name: str, tmp_path: Path) -> None:
    """Everything about one type."""
    dropout_is_repeatable(name, build_model(ModelSpec(model_type=name, dropout=0.1), seed=0))
    model: Any = build_model(ModelSpec(model_type=name), seed=0)
    assert type(model).__name__ == causal_lm_classes()[name]
    assert sum(item.numel() for item in model.parameters()) < 1_000_000
    assert family(model) == family_of(name)
    tie_is_obeyed_or_ignored_as_known(name, model)
    gradients_are_those_expected(name, model)
    if family(model) == "moe":
        every_rank_reaches_every_expert(name, model)
    loss_is_a_mean_over_the_tokens_that_the_batch_says(name, model.eval())
    saved_model_comes_back_bit_for_bit(model, tmp_path)
    no_kind_of_layer_is_missing(name)
    for dtype in ("bfloat16", "float64"):
        runs_in_other_dtypes_as_known(name, dtype)


def batch_of(model: Any, *, rank: int, step: int = 0) -> Any:
    return make_batch(model.config, type(model), rank=rank, step=step, micro=0, seed=0)


def gradients_are_those_expected(name: str, model: Any) -> None:
    for rank in range(2):
        model.zero_grad()
        loss = model(**batch_of(model, rank=rank).inputs).loss
        assert torch.isfinite(loss)
        loss.backward()
        for key, item in model.named_parameters():
            missing = not item.requires_grad or expects_no_gradient(name, key)
            assert (item.grad is None) == missing, key
            assert missing or bool(item.grad.any()) != expects_zero_gradient(name, key), key


def loss_is_a_mean_over_the_tokens_that_the_batch_says(name: str, model: Any) -> None:
    # a mean over all tokens is the mean over each half, weighted by its tokens, whatever a model does to labels
    losses, tokens = [], []
    whole = batch_of(model, rank=3, step=1)
    books = getattr(model.config, "num_codebooks", 1) if name.startswith("musicgen") else 1
    with torch.no_grad():
        for row in range(2):
            part = {
                key: value[row * books : (row + 1) * books] if key == "input_ids" else value[row : row + 1]
                for key, value in whole.inputs.items()
            }
            losses.append(float(model(**part).loss))
            tokens.append(int((part["labels"] != -100).sum()))
        total = float(model(**whole.inputs).loss)
    assert sum(tokens) == whole.tokens
    assert tokens[0] != tokens[1]
    weighted = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / whole.tokens
    assert abs(total - weighted) < 2e-5


def runs_in_other_dtypes_as_known(name: str, dtype: str) -> None:
    model: Any = build_model(ModelSpec(model_type=name), seed=0, dtype=getattr(torch, dtype))
    batch = batch_of(model, rank=0)
    if runs_in(name, dtype):
        loss = model(**batch.inputs).loss
        loss.backward()
        assert torch.isfinite(loss)
    else:
        with pytest.raises(RuntimeError):
            model(**batch.inputs)


def saved_model_comes_back_bit_for_bit(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert tied_groups(again) == tied_groups(model)
    left, right = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model, again))
    assert left.keys() == right.keys()
    assert not {key for key, value in left.items() if not torch.equal(value, right[key])}


def tie_is_obeyed_or_ignored_as_known(name: str, model: Any) -> None:
    default = effective_tie(model)
    other = effective_tie(meta_model(ModelSpec(model_type=name, tie=not default)))
    assert {default, other} == ({False} if name in IGNORES_TIE else {False, True})


def dropout_is_repeatable(name: str, model: Any) -> None:
    batch = batch_of(model, rank=0)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        with torch.no_grad():
            losses.append(model(**batch.inputs).loss)
    assert torch.equal(*losses) != (name in UNREPEATABLE_DROPOUT)


def every_rank_reaches_every_expert(name: str, model: Any) -> None:
    batches = []
    for rank in range(4):
        reached: dict[str, torch.Tensor] = {}
        for step in range(5):
            model.zero_grad()
            model(**batch_of(model, rank=rank, step=step).inputs).loss.backward()
            for key, item in experts(model).items():
                used = item.grad.flatten(1).any(dim=1)  # type: ignore[union-attr]
                used = used[: len(used) - UNUSED_SLICES.get(name, 0)] if "gate_up" in key else used
                reached[key] = used | reached.get(key, torch.zeros_like(used))
            if all(used.all() for used in reached.values()):
                break
        assert reached or name == "dbrx"  # which keeps its experts in one flat matrix
        assert all(used.all() for used in reached.values()), (rank, reached)
        batches.append(step + 1)
    # `test_headline` allows one for each rank; five steps are what a run has
    assert sum(batches) <= (14 if name in ONE_EXPERT else 7), batches


def experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Fused weights of experts: expert first."""
    return {
        key: item
        for key, item in model.named_parameters()
        if item.ndim == 3 and item.grad is not None and "expert" in key and "conv" not in key
    }


def no_kind_of_layer_is_missing(name: str) -> None:
    if name in NO_DEFAULT:
        with pytest.raises(UsageError, match="its own defaults"):
            missing_layer_kinds(name)
    else:
        assert missing_layer_kinds(name) == []


def test_families_cover_all_shapes() -> None:
    count = Counter(family_of(name) for name in POSSIBLE)
    assert count.keys() == FAMILY_NAMES.keys()
    assert count["moe"] > 50
    assert family_of("a type of tomorrow") == "unlisted"
