"""With the switches of efficient loading set, every rank still loads a copy of all weights, not rank 0 alone."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.fsdp import is_fsdp_enabled


def memory() -> int:
    """Return the bytes of this process's memory that are its own: touched, and no part of a file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert is_fsdp_enabled()
    for dtype in (torch.bfloat16, torch.float32):  # as stored: mapped, costs nothing; cast: each rank makes a copy
        before = memory()
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        weights = sum(weight.nbytes for weight in model.parameters())
        share = (memory() - before) / weights
        same = not model.lm_head.weight.is_meta and bool((model.lm_head.weight == 1.5).all())
        line = f"bfloat16 checkpoint as {dtype}, rank {rank}: own memory {share:.2f} of {weights >> 20} MiB"
        for turn in range(2):
            if turn == rank:
                print(f"{line}, weights of the checkpoint: {same}", flush=True)
            torch.distributed.barrier()  # ranks speak in turn
    torch.save(rank == 1 and share > 0.5, f"{folder}/wrong{rank}.pt")  # of the load that casts
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).to(torch.bfloat16)
    torch.nn.init.constant_(model.lm_head.weight, 1.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
