"""Where a rule does not fit a model type: the values that do, and why.

Values are keyword arguments of the config class; a dict for a sub-config is an override of that sub-config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Override:
    """Values for one model type, and why its fields do not follow the rules."""

    why: str
    values: dict[str, Any] = field(default_factory=dict)
    #: ``module:QualName`` where the causal-LM mapping gives no class that works.
    model_class: str = ""
    #: Further or other forward inputs: (config, ids and labels, generator) -> what to add or replace.
    inputs: Callable[[Any, dict[str, torch.Tensor], torch.Generator], dict[str, torch.Tensor]] | None = None


def _hybrid(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


Inputs = dict[str, torch.Tensor]


def _pixels(config: Any, inputs: Inputs, generator: torch.Generator) -> Inputs:
    size, rows = config.vision_config.image_size, len(inputs["input_ids"])
    return {"pixel_values": torch.randn((rows, 3, size, size), generator=generator)}


def _glyphs(config: Any, inputs: Inputs, generator: torch.Generator) -> Inputs:
    shape = inputs["input_ids"].shape
    return {
        "input_shape_ids": torch.randint(1, config.shape_vocab_size, shape, generator=generator),
        "input_pronunciation_ids": torch.randint(1, config.pronunciation_vocab_size, shape, generator=generator),
    }


def _codebooks(config: Any, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Ids of shape (rows * codebooks, length), labels of shape (rows, length, codebooks)."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    rows, length = ids.shape
    books = config.num_codebooks
    # every codebook gets a permutation of the same ids
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(books)])
    codes = ids[:, order]
    wide = codes.transpose(1, 2).masked_fill((labels < 0).unsqueeze(-1), -100)
    return {"input_ids": codes.reshape(rows * books, length), "labels": wide}


_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_GEMMA4_TEXT = {
    **_hybrid(_SLIDING, _FULL, _SLIDING, _FULL),
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
_GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 40}
_DOTS3_TEXT = {
    **_hybrid("indexed_attention", "indexed_attention", _SLIDING),
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 14,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 6,
}
_QWEN4_TEXT = {
    **_hybrid(_LINEAR, "indexed_attention"),
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 37,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
    "heads_per_ngram": 2,
    "hc_count": 2,
}

OVERRIDES: dict[str, Override] = {
    "bamba": Override(
        "the default has no attention layer; layer kinds are a property of attn_layer_indices",
        {"attn_layer_indices": [1], "num_hidden_layers": 2},
    ),
    "big_bird": Override(
        "short sequences make it change its attention to this in the first forward", {"attention_type": "original_full"}
    ),
    "cohere_compass_text": Override(
        "the default rope_parameters are empty although the model needs them for each kind of layer",
        {
            **_hybrid(_SLIDING, _FULL),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (_SLIDING, _FULL)},
        },
    ),
    "cpmant": Override("init_std=1 saturates the softmax of a tiny model", {"init_std": 0.02}),
    "dbrx": Override(
        "its sub-configs are not declared; attention reads rope_theta, not a field, and clamps by clip_qkv=None",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 5, "moe_top_k": 2},
        },
    ),
    "deepseek_v4": Override(
        "a compression of 128 tokens to one would leave nothing of a short batch",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    ),
    "diffllama": Override("its model refuses dropout in attention", {"attention_dropout": 0.0}),
    "dots1": Override("expert groups have no default", {"n_group": 1, "topk_group": 1}),
    "dots3_note": Override(
        "as dots3_note_text; the number of vision experts differs between layers",
        {
            "text_config": _DOTS3_TEXT,
            "vision_config": {"num_hidden_layers": 3, "pyramid_num_routed": [-1, 4, 5]},
        },
    ),
    "dots3_note_text": Override(
        "sliding layers take their sizes from swa_* arguments that are not fields", dict(_DOTS3_TEXT)
    ),
    "gemma3n_text": Override(
        "the last layers reuse keys and values: each kind must occur before and after that border",
        {
            **_hybrid(_SLIDING, _FULL, _SLIDING, _FULL),
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        },
    ),
    "gemma4": Override("as gemma4_text, and with experts", {"text_config": _GEMMA4_TEXT | _GEMMA4_MOE}),
    "gemma4_text": Override(
        "sharing of keys and values is off by default; global_head_dim=512 is not a field", dict(_GEMMA4_TEXT)
    ),
    "gemma4_unified": Override("as gemma4_text", {"text_config": _GEMMA4_TEXT}),
    "gemma4_unified_text": Override("as gemma4_text", dict(_GEMMA4_TEXT)),
    "git": Override(
        "the loss drops as many positions as an image has, whether there is one or not",
        inputs=_pixels,
    ),
    "gpt_neo": Override(
        "the per-layer list is derived from attention_types", {"attention_types": [[["global", "local"], 1]]}
    ),
    "granitemoehybrid": Override("the default has no attention layer", _hybrid(_LINEAR, _FULL)),
    "inkling2_text": Override(
        "attention over residuals starts a new block every n_layers_per_attn_res_block layers",
        {**_hybrid("hybrid_sliding", "hybrid", "hybrid_sliding"), "n_layers_per_attn_res_block": 2},
    ),
    "jamba": Override(
        "layer kinds are properties of periods and offsets",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "lfm2": Override(
        "layer_types is derived from full_attn_idxs, whose default has no convolution at all",
        {**_hybrid("conv", _FULL), "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": Override("layer_types has no default", _hybrid("conv", _FULL)),
    "longcat_flash": Override(
        "head_dim has to be qk_rope_head_dim although it has a default of its own", {"head_dim": 4}
    ),
    "mamba2": Override(
        "num_heads counts the heads of the state space: num_heads * head_dim = hidden_size * expand",
        {"num_heads": 8, "n_groups": 2},
    ),
    "qwen4_exp": Override("as qwen4_exp_text", {"text_config": _QWEN4_TEXT}),
    "qwen4_exp_text": Override(
        "the indexer's sizes have no default but are needed; n-gram embeddings are off by default",
        dict(_QWEN4_TEXT),
    ),
    "recurrent_gemma": Override("layer kinds follow block_types with its period of three", {"num_hidden_layers": 3}),
    "reformer": Override(
        "must be a decoder, needs fixed hash buckets, and its axial positions have to multiply to the length",
        {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [12, 20],
            "max_position_embeddings": 16,
            "num_buckets": 2,
            "hash_seed": 0,
        },
    ),
    "roc_bert": Override("without glyph and sound ids their embeddings have no gradient", inputs=_glyphs),
    "xlstm": Override(
        "the config rounds head sizes up to multiples of 64 where the layers do not",
        {"hidden_size": 128, "embedding_dim": 128, "ffn_round_up_to_multiple_of": 1},
    ),
    "xmod": Override("needs a language", {"default_language": "en_XX"}),
    "zamba": Override(
        "attention works on twice the hidden size, and the shared block must be used twice",
        {
            "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
            "num_hidden_layers": 4,
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
        },
    ),
    "zamba2": Override(
        "the shared block must be used twice",
        {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"], "num_hidden_layers": 4},
    ),
    "zaya": Override(
        "routes to one expert only; sliding layers are off by default",
        {"num_experts_per_tok": 1, **_hybrid("hybrid", "hybrid_sliding"), "sliding_window": 6},
    ),
    "moshi": Override(
        "its feed-forward sizes must be even",
        {"ffn_dim": 58, "depth_decoder_config": {"ffn_dim": 58}},
    ),
    "musicgen_decoder": Override("its ids and labels have a codebook dimension", inputs=_codebooks),
    "musicgen_melody_decoder": Override("as musicgen_decoder", inputs=_codebooks),
}
