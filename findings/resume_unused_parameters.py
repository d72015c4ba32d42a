"""Optimizer state cannot be loaded where a trainable parameter never had a gradient."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = DistributedConfig(fsdp_size=2)
    model, other = (AutoModelForCausalLM.from_pretrained(folder, distributed_config=config) for _ in range(2))
    ids, optimizer = torch.arange(8).view(1, 8), torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    optimizer.step()  # of GLM-MoE-DSA's indexer, which picks tokens by top-k, no state is saved; the load demands it
    save_optimizer_distributed(model, optimizer, f"{folder}/optimizer")
    result, wrong = "loaded", False
    try:
        load_optimizer_distributed(other, torch.optim.AdamW(other.parameters()), f"{folder}/optimizer")
    except BaseException as error:  # torch's CheckpointException is no Exception
        missing = next(line for line in str(error).splitlines() if line.startswith("RuntimeError: Missing key"))
        result, wrong = f"{type(error).__name__}: {missing}", True
    if rank == 0:
        print(f"{len(without)} parameters without gradient, such as {without[0]}\nload: {result}")
    torch.save(wrong, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "index_n_heads": 2, "index_topk": 4}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(GlmMoeDsaConfig(**sizes)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
