"""The families of the model types, as data: selecting by family builds no model and imports no torch.

`fsdp_testkit.models.family.family` tells a family from a model's modules; `tests/models` compares the two for every
type. A type that is in no list here has the family ``unlisted``.
"""

from __future__ import annotations

from collections.abc import Sequence

from fsdp_testkit.core.errors import UsageError

#: Family -> what it is.
FAMILY_NAMES: dict[str, str] = {
    "dense": "a decoder with attention in every block",
    "moe": "a mixture of experts",
    "hybrid": "attention beside recurrent or convolution mixers",
    "decoder": "the decoder of an encoder-decoder, or an encoder used as one",
    "multimodal": "with a vision or audio tower",
    "other": "no attention at all",
}

#: Family of a type that no list has: a release of transformers newer than this table.
UNLISTED = "unlisted"

_LISTS: dict[str, str] = {
    "dense": """
        apertus arcee biogpt bitnet bloom blt codegen cohere cohere2 cohere_compass_text cpmant ctrl cwm diffllama
        doge emu3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text gemma3n_text gemma4_assistant gemma4_text
        gemma4_unified_assistant gemma4_unified_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
        gpt_neox_japanese gptj granite granite_swa helium hrm_text hunyuan_v1_dense hyperclovax internlm3
        iquestcoder jais2 llama minicpm3 ministral ministral3 mistral mllama modernbert-decoder moshi mpt nanochat
        nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 reformer seed_oss smollm3 stablelm
        starcoder2 vaultgemma xglm xlm xlnet youtu
    """,
    "moe": """
        afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
        deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe
        glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
        hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe
        llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral
        nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp
        qwen4_exp_text solar_open zaya
    """,
    "hybrid": """
        bamba falcon_h1 lfm2 lfm3 olmo_hybrid qwen3_5 qwen3_5_text recurrent_gemma zamba zamba2
    """,
    "decoder": """
        bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text
        electra ernie marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart prophetnet rembert
        roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm-roberta xlm-roberta-xl xmod
    """,
    "multimodal": """
        fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 moss_transcribe_diarize phi4_multimodal
    """,
    "other": """
        falcon_mamba mamba mamba2 rwkv xlstm
    """,
}

_FAMILY = {model: family for family, models in _LISTS.items() for model in models.split()}


def family_of(model_type: str) -> str:
    """Return the family of a model type, `UNLISTED` where it is in no list (or is a path of a config)."""
    return _FAMILY.get(model_type, UNLISTED)


def of_families(models: Sequence[str], text: str) -> tuple[str, ...]:
    """Return those of ``models`` that belong to one of the comma-separated families.

    Raises:
        UsageError: a family is unknown, or nothing is left.
    """
    known = (*FAMILY_NAMES, UNLISTED)
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for name in wanted:
        if name not in known:
            raise UsageError(f"family={name!r} must be one of {', '.join(known)}")
    chosen = tuple(model for model in models if family_of(model) in wanted)
    if not chosen:
        raise UsageError(f"family={text!r} leaves none of the {len(models)} selected models")
    return chosen
