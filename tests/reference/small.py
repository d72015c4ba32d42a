"""Small models for these tests, by hand: what they are must not depend on the rest of the kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 101  # a prime: no number of ranks divides it


def build(name: str, *, tie: bool = False, seed: int = 0, layers: int = 2, **options: Any) -> Any:
    """Return a small model in eval mode, on the CPU, in fp32."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": tie, **options}
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 32}
        kind, config = GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, **common)
    else:
        common |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
        common |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        if name == "mixtral":
            kind, config = MixtralForCausalLM, MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **common)
        else:
            kind, config = LlamaForCausalLM, LlamaConfig(**common)
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():  # no weight is left at the ones and zeros that hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def checkpoint(folder: Path, name: str, **options: Any) -> Path:
    """Save `build(name)` under ``folder`` with ``save_pretrained``; return where."""
    target = folder / "-".join([name, *(f"{key}{value}" for key, value in sorted(options.items()))])
    build(name, **options).save_pretrained(target)
    return target


def batch(rank: int, step: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs that differ between ranks and steps."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def mesh_of(shape: tuple[int, ...]) -> Any:
    """Return a CPU mesh of all ranks: (shard,) or (replicate, shard)."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def assert_equal_to(model: Any, whole: Any) -> None:
    """Compare a sharded model's parameters and buffers with those of an unsharded one, to the bit."""
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    for (name, buffer), (_, other) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
