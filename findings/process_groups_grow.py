"""Every sharded `from_pretrained` makes process groups that outlive the model: threads and open files add up."""

import gc
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    threads, files = [], []
    for _ in range(4):
        model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
        del model
        gc.collect()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        torch.distributed.barrier()  # all ranks have counted before one goes on
    if rank == 0:
        print(f"after each of 4 loads of a model that is then deleted: threads {threads}, open files {files}")
    torch.save(threads[-1] > threads[1], f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
