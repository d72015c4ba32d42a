"""Every sharded `from_pretrained` makes process groups that outlive the model: threads and open files add up."""

import gc
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    threads, files = [], []
    for _ in range(4):
        model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
        del model
        gc.collect()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        dist.barrier()  # all ranks have counted before one goes on
    if rank == 0:
        print(
            f"after each of 4 loads of a model that is then deleted: threads {threads}, open files {files}", flush=True
        )
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(threads[-1] > threads[1]))


def main() -> int:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
