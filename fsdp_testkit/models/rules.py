"""The rules that make a config tiny: one table, decided by field name.

Sizes differ from each other and are mostly divisible by none of 2, 3 and 4, so that parameters shard
unevenly and a swapped dimension shows. The first row whose pattern matches the whole field name wins.
A row's value is a number, `KEEP` (the default is right as it is), or a function of the `Fields` at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

VOCAB: Final = 131  # prime
HIDDEN: Final = 32  # heads x head_dim; even, as rotary embeddings and grouped matmuls need
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 8
FFN: Final = 53  # prime
# grouped_mm needs strides that are multiples of 16 bytes: 8 elements in bf16
GROUPED_FFN: Final = 56
EXPERT_FFN: Final = 40
SHARED_FFN: Final = 41  # prime
EXPERTS: Final = 5
TOP_K: Final = 2
WINDOW: Final = 6  # shorter than the batch's 16 tokens, so that it matters
CHUNK: Final = 8  # the same, and a divisor of 16 for those that do not pad
POSITIONS: Final = 67  # prime; more than batch length plus any offset
#: Token ids of multimodal placeholders count down from the end of the vocabulary.
LAST_PLACEHOLDER: Final = VOCAB - 1
#: First id that a placeholder may have; batches use ids from `FIRST_WORD` below it.
FIRST_PLACEHOLDER: Final = VOCAB - 16
FIRST_WORD: Final = 5

KEEP: Final = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of the config class at hand, with their defaults."""

    defaults: dict[str, Any]

    def has(self, pattern: str) -> bool:
        """Return whether a field's whole name matches."""
        return any(re.fullmatch(pattern, name) for name in self.defaults)

    @property
    def latent(self) -> bool:
        """Whether attention keeps keys and values in one latent vector (MLA): no grouped KV heads then."""
        return self.has("kv_lora_rank")

    @property
    def experts_use_ffn(self) -> bool:
        """Whether ``intermediate_size`` is the size of an expert."""
        own_size = r"(moe|expert)_(intermediate|ffn_hidden)_size"
        return self.has(EXPERT_COUNT) and not self.has(own_size)


EXPERT_COUNT: Final = "num_(local_)?experts|n_routed_experts|moe_num_experts|num_experts_total|num_routed_experts"

Value = int | object | Callable[[Fields], Any]

#: Fields that are an integer of more than 8, or any integer where the pattern matches.
SIZE_RULES: tuple[tuple[str, Value], ...] = (
    # not sizes
    (r"seed|hash_seed|init_device|pretraining_tp|sampling_rate|transformers_version", KEEP),
    (
        r"type_vocab_size|task_type_vocab_size|n_langs|num_channels|in_channels|out_channels|audio_channels",
        KEEP,
    ),
    (r"(encoder_)?no_repeat_ngram_size|mask_(time|feature)_\w+|median_filter_width|(start|end)_n_top", KEEP),
    (r"max_window_layers", 1),
    (r"scale_emb|floor_scale|log_scaling_n_floor|query_pre_attn_scalar|bias_max_distance", KEEP),
    (r"hc_sinkhorn_iters", 3),
    (r"dim_model_base", HIDDEN),
    # depth
    (r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers", 2),
    (r"num_blocks|depth|num_global_layers|conf_num_hidden_layers|num_layers_per_stack", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers|num_mtp_layers|moe_layer_end_index|num_kv_shared_layers", KEEP),
    # experts
    (EXPERT_COUNT, EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts", TOP_K),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", lambda _: 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"zero_expert_num", 3),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_latent_size", EXPERT_FFN),
    (r"(moe_)?shared_experts?_intermediate_size|shared_intermediate_size", SHARED_FFN),
    (r"router_hidden_size", 11),
    # attention
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads", lambda f: HEADS if f.latent else KV_HEADS),
    (r"(swa_)?(num_)?attention_heads|n_heads?|num_heads|(num_)?(encoder|decoder)_attention_heads", HEADS),
    (r"conf_num_attention_heads", HEADS),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", HEAD_DIM),
    (r"v_head_dim", 6),
    (r"q_lora_rank|o_lora_rank", 14),
    (r"kv_lora_rank", 10),
    (r"index_topk", 4),
    (
        r"(swa_)?head_dim|dim_head|kv_channels|attention_head_size|d_head|index_head_dim|linear_head_dim",
        HEAD_DIM,
    ),
    (r"(linear_)?(key|value)_head_dim|linear_(key|value)_head_dim|mamba_head_dim|mamba_d_head", HEAD_DIM),
    (r"index_n_heads|linear_num_heads", HEADS),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"rotary_dim", 4),
    (
        r"attention_chunk_size|conf_attention_chunk_size|(mamba_)?chunk_size|block_size|index_block_size",
        CHUNK,
    ),
    (r"(lsh|local)_attn_chunk_length", CHUNK),
    (
        r"sliding_window(_size)?|attention_window_size|local_attention(_window_len)?|window_size|keep_window_size",
        WINDOW,
    ),
    # widths
    (r"hidden_size|d_model|n_embd|emb_dim|word_embed_proj_dim|hidden_size_global|input_size", HIDDEN),
    (
        r"intermediate_size|ffn_hidden_size|(decoder_|encoder_)?ffn_dim|n_inner|d_inner|dff|dim_ff|feed_forward_size",
        lambda f: GROUPED_FFN if f.experts_use_ffn else FFN,
    ),
    (r"(dense|intermediate)_(intermediate_)?size(_mlp)?|mlp_dim", FFN),
    (r"embedding_size|lru_width|projector_(in|out)put_dim|(audio|mm)_embed_dim|out_hidden_size", HIDDEN),
    # state spaces
    (r"mamba_d_state|state_size|ssm_state_size", 10),
    (r"mamba_n_heads|mamba_num_heads", HIDDEN * 2 // HEAD_DIM),
    (r"mamba_d_ssm", HIDDEN * 2),
    (r"block_multiple_of", 1),
    # small ranks and tables beside the main path
    (r"gated_norm_rank|laurel_rank|adapter_rank|d_rel", 6),
    (r"hc_lowrank|prompt_mid_dim|pronunciation_embed_dim", 12),
    (r"hidden_size_per_layer_input|prompt_types|segment_types", 9),
    (r"(position_bias_|relative_attention_)?num_buckets|rel_extent", 8),
    (r"(position_bias_|relative_attention_|relative_)max_distance|mem_len", 12),
    (r"prompt_length", 7),
    (r"input_embedding_size|shape_embed_dim", 24),
    (r"output_embedding_size", 40),
    (r"index_topk_blocks", 1),
    (r"d_kv", HEAD_DIM),
    (r"d_ff", FFN),
    (r"num_centroids|centroid_intermediate_top_k|classifier_proj_size", KEEP),
    # vision and audio towers: built, loaded and sharded, but a text batch does not enter them
    (r"patch_size", 4),
    (r"image_size|crop_size|image_seq_length|num_position_embeddings", 16),
    (r"mm_tokens_per_image", 4),
    (r"mm_posemb_size|position_embedding_size|chroma_length", 17),
    (r"adapter_(in|out)_dim|adapter_input_size|output_proj_dims|backbone_hidden_size|vision_output_dim", HIDDEN),
    (r"output_channels|downsample_hidden_size", 12),
    (r"base_channels", 32),  # 32 groups in its norms
    (r"num_filters", HEAD_DIM),
    (r"codebook_dim|vector_quantization_hidden_dimension|num_mel_bins|feature_size|codebook_size", 16),
    (r"upsample_groups|(ext_pw|depthwise_separable)_out_channel|nemo_conv_channels", HIDDEN),
    (r"num_quantizers|audio_chunk_size|hop_length|num_chroma|left_chunk|attention_context_left", KEEP),
    # vocabulary and positions
    (r"encoder_hash_byte_group_vocab", VOCAB),
    (r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input|\w*_vocab_size", VOCAB),
    (
        r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length",
        POSITIONS,
    ),
    (r"max_(source|target)_positions|max_inference_chunksize", POSITIONS),
)

#: Ids of the special tokens, below every word id of a batch.
SPECIAL_IDS: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}

#: Multimodal placeholders: above every word id of a batch, so that no batch asks for an image.
PLACEHOLDERS: tuple[tuple[str, int], ...] = tuple(
    (pattern, LAST_PLACEHOLDER - index)
    for index, pattern in enumerate(
        (
            r"image_token_(id|index)",
            r"video_token_(id|index)",
            r"audio_token_(id|index)",
            r"bo[iv]_token_(id|index)|vision_start_token_id",
            r"eo[iv]_token_(id|index)|vision_end_token_id",
            r"boa_token_(id|index)",
            r"eoa_token_(id|index)",
        )
    )
)

#: Fields whose default is ``None`` and which have to be given nevertheless. Others keep ``None``.
NONE_RULES: tuple[tuple[str, Value], ...] = (
    (r"num_key_value_heads", lambda f: KEEP if f.latent else KV_HEADS),
    (r"num_experts_per_tok", TOP_K),
    (r"n_routed_experts", EXPERTS),
    (r"n_shared_experts", 1),
    (r"head_dim", lambda f: KEEP if f.latent else HEAD_DIM),
    (r"n_inner", FFN),
)

#: Counts of dense layers at the start of a model whose other layers have experts.
LEADING_DENSE: Final = ("first_k_dense_replace", "num_dense_layers")
#: Lists of layers by number.
LAYER_NUMBERS: Final = r"\w+_(layers|layer_ids|layers_indices|idxs)"
#: Layers of a model that can slide although its default does not.
SLIDING: Final = ("sliding_attention", "full_attention")


def can_slide(config: Any, lists: dict[str, list[Any]]) -> bool:
    """Return whether the model knows sliding windows per layer although its default never slides."""
    kinds = lists.get("layer_types", [])
    return set(kinds) == {"full_attention"} and hasattr(config, "sliding_window")
