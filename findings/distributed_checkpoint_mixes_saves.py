"""A distributed checkpoint saved over one of more ranks is loaded as a mixture of both, silently.

`save_pretrained(..., distributed_checkpoint=True)` writes a file per rank and leaves those of an earlier save there;
`from_pretrained` reads all of them.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, ranks: int, folder: str) -> None:
    """Fill all weights with the number of ranks, save, and load what was saved."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{ranks}", ranks), rank=rank, world_size=ranks)
    config = DistributedConfig(fsdp_size=ranks)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float(ranks))
    model.save_pretrained(f"{folder}/saved", distributed_checkpoint=True)
    loaded = LlamaForCausalLM.from_pretrained(f"{folder}/saved", distributed_config=config)
    head = loaded.lm_head.weight.full_tensor()
    if rank == 0:
        files = len(list(Path(f"{folder}/saved").glob("*.safetensors")))
        print(
            f"saved by {ranks} ranks, {files} files: expected all weights {ranks}, head {head[:, 0].tolist()}",
            flush=True,
        )
        torch.save(bool((head != ranks).any()), f"{folder}/wrong.pt")
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()


def main() -> int:
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        for ranks in (4, 2):
            mp.spawn(rank_main, args=(ranks, folder), nprocs=ranks)
            wrong |= torch.load(f"{folder}/wrong.pt")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
