"""A distributed checkpoint saved over one of more ranks is loaded as a mixture of both, silently.

`save_pretrained(..., distributed_checkpoint=True)` writes a file per rank and leaves those of an earlier save there;
`from_pretrained` reads all of them.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, ranks: int, folder: str) -> None:
    """Fill all weights with the number of ranks, save, and load what was saved."""
    store = f"file://{folder}/store{ranks}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    config = DistributedConfig(fsdp_size=ranks)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config)
    for weight in model.parameters():
        torch.nn.init.constant_(weight, ranks)
    model.save_pretrained(f"{folder}/saved", distributed_checkpoint=True)
    loaded = LlamaForCausalLM.from_pretrained(f"{folder}/saved", distributed_config=config)
    head = loaded.lm_head.weight.full_tensor()
    if rank == 0:
        files = len(list(Path(f"{folder}/saved").glob("*.safetensors")))
        print(f"saved by {ranks} ranks, {files} files: expected all weights {ranks}, head {head[:, 0].tolist()}")
    torch.save(bool((head != ranks).any()), f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    tiny = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny).save_pretrained(folder)
        for ranks in (4, 2):
            torch.multiprocessing.spawn(rank_main, args=(ranks, folder), nprocs=ranks)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
