"""`save_pretrained(state_dict=...)` of a sharded model stores the model's own weights instead, silently."""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

NAME = "model.norm.weight"


def save_averaged(model: LlamaForCausalLM, folder: str, **arguments: bool) -> None:
    """Save what an average of weights would be, as a state dict: here zeros."""
    averaged = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=averaged, **arguments)


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    save_averaged(model, f"{folder}/sharded", is_main_process=rank == 0)
    dist.barrier()  # nobody leaves before all is written
    dist.destroy_process_group()


def main() -> int:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        save_averaged(LlamaForCausalLM.from_pretrained(folder), f"{folder}/plain")
        mp.spawn(rank_main, args=(folder,), nprocs=2)
        plain, sharded = (load_file(f"{folder}/{name}/model.safetensors") for name in ("plain", "sharded"))
    different = [name for name, value in plain.items() if not torch.equal(value, sharded[name])]
    print(f"given a state dict of zeros: one process stores {NAME} {plain[NAME][:4].tolist()}")
    print(f"                             two ranks store    {NAME} {sharded[NAME][:4].tolist()}")
    print(f"{len(different)} of {len(plain)} tensors are not those that were given")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
