"""`save_pretrained(state_dict=...)` of a sharded model stores the model's own weights instead, silently."""

import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def save_averaged(model: LlamaForCausalLM, folder: str, **arguments: bool) -> None:
    """Save what an average of weights would be, as a state dict: here zeros."""
    averaged = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=averaged, **arguments)


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    save_averaged(model, f"{folder}/sharded", is_main_process=rank == 0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny).save_pretrained(folder)
        save_averaged(LlamaForCausalLM.from_pretrained(folder), f"{folder}/plain")
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        plain, sharded = (load_file(f"{folder}/{name}/model.safetensors") for name in ("plain", "sharded"))
    different = [name for name in plain if not torch.equal(plain[name], sharded[name])]
    norm = "model.norm.weight"
    print(f"given a state dict of zeros: one process stores {norm} {plain[norm][:4].tolist()}")
    print(f"                             two ranks store    {norm} {sharded[norm][:4].tolist()}")
    print(f"{len(different)} of {len(plain)} tensors are not those that were given")
    sys.exit(bool(different))
