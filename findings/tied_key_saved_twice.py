"""A tied, sharded model stores its head beside its embedding: save_pretrained looks for ties after gathering."""

import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()


def stored(folder: str) -> tuple[set[str], int]:
    file = Path(folder, "model.safetensors")
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys()), file.stat().st_size


def main() -> int:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        mp.spawn(rank_main, args=(folder,), nprocs=2)
        (expected, small), (actual, large) = stored(folder), stored(f"{folder}/sharded")
    print(f"one process: {len(expected)} keys, {small} bytes\ntwo ranks:   {len(actual)} keys, {large} bytes")
    print(f"extra keys:  {sorted(actual - expected)}")
    return int(actual != expected)


if __name__ == "__main__":
    sys.exit(main())
