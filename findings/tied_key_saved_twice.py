"""A tied, sharded model stores its head beside its embedding: save_pretrained looks for ties after gathering."""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    torch.distributed.destroy_process_group()


def stored(file: str) -> tuple[set[str], int]:
    return set(load_file(file)), Path(file).stat().st_size


if __name__ == "__main__":
    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        expected, small = stored(f"{folder}/model.safetensors")
        actual, large = stored(f"{folder}/sharded/model.safetensors")
    print(f"one process: {len(expected)} keys, {small} bytes\ntwo ranks:   {len(actual)} keys, {large} bytes")
    print(f"extra keys:  {sorted(actual - expected)}")
    sys.exit(actual != expected)
