"""With the switches of efficient loading set, every rank still loads a copy of all weights, not rank 0 alone.

A checkpoint in the dtype that is asked for is mapped, which costs nothing; one that is cast is copied by each rank.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.fsdp import is_fsdp_enabled

SWITCHES = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def memory() -> int:
    """Return the bytes of this process's memory that are its own: touched, and no part of a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {**SWITCHES, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    assert is_fsdp_enabled()
    shares = {}
    for dtype in (torch.bfloat16, torch.float32):
        before = memory()
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        weights = sum(weight.nbytes for weight in model.parameters())
        shares[dtype] = (memory() - before) / weights
        same = not model.lm_head.weight.is_meta and bool((model.lm_head.weight == 1.5).all())
        line = f"bfloat16 checkpoint as {dtype}, rank {rank}: own memory {shares[dtype]:.2f} of {weights >> 20} MiB"
        for turn in range(2):
            if turn == rank:
                print(f"{line}, weights of the checkpoint: {same}", flush=True)
            dist.barrier()  # ranks speak in turn, and nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(rank == 1 and shares[torch.float32] > 0.5))


def main() -> int:
    config = LlamaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        torch.nn.init.constant_(model.lm_head.weight, 1.5)
        model.save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
