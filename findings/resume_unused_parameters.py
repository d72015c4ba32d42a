"""Optimizer state cannot be loaded where a trainable parameter never had a gradient.

GLM-MoE-DSA's indexer picks tokens by top-k and gets none. Its state is not saved, and is demanded on load.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model, other = (
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)) for _ in "ab"
    )
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    optimizer.step()
    save_optimizer_distributed(model, optimizer, f"{folder}/optimizer")
    try:
        load_optimizer_distributed(other, torch.optim.AdamW(other.parameters()), f"{folder}/optimizer")
        result, wrong = "loaded", False
    except CheckpointException as error:
        lines = [line for line in str(error).splitlines() if line.startswith("RuntimeError: Missing key")]
        result, wrong = f"{type(error).__name__}: {lines[0] if lines else error}", True
    if rank == 0:
        print(f"{len(without)} parameters without gradient, such as {without[0]}\nload: {result}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(wrong))


def main() -> int:
    config = GlmMoeDsaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
