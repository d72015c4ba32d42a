"""The checkpoints of `benchmarks.loading`: random weights in bf16, in the shapes of real models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

#: The model classes by what the table calls them.
CLASSES: dict[str, type[PreTrainedModel]] = {"dense": LlamaForCausalLM, "moe": MixtralForCausalLM}


def build(kind: str, mib: int, folder: Path) -> Path:
    """Write a checkpoint of about ``mib`` MiB under ``folder``, unless it is there; return where.

    Args:
        kind: ``dense`` (Llama), or ``moe`` (Mixtral: experts one by one in the file, fused in the model).
        mib: size of the safetensors files; layers are added until it is reached, in small sizes width shrinks.
        folder: where checkpoints of all sizes live side by side.
    """
    target = folder / f"{kind}-{mib}"
    if (target / "done").exists():
        return target
    wanted = mib * 2**20 // 2
    width = 2048 if mib >= 512 else 1024 if mib >= 128 else 128
    per_layer, rest = (_count(kind, width, layers) for layers in (1, 0))
    per_layer -= rest
    config = _config(kind, width, max(2, round((wanted - rest) / per_layer)))
    with torch.device("meta"):
        model = CLASSES[kind](config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(target, max_shard_size="512MB")
    (target / "done").write_text(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))
    return target


def _config(kind: str, width: int, layers: int) -> LlamaConfig | MixtralConfig:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "vocab_size": width * 16 - 7,  # no number of ranks divides it
        "tie_word_embeddings": False,
    }
    if kind == "dense":
        return LlamaConfig(intermediate_size=width * 11 // 4, **sizes)
    return MixtralConfig(intermediate_size=width // 4, num_local_experts=32, num_experts_per_tok=4, **sizes)


def _count(kind: str, width: int, layers: int) -> int:
    with torch.device("meta"):
        model = CLASSES[kind](_config(kind, width, layers))
    return sum(parameter.numel() for parameter in model.parameters())
