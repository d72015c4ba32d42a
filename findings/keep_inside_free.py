"""A manual plan that keeps a module inside a freed block cannot be applied: parents are wrapped before children."""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrong = False
    for strategy in ("free", "keep"):
        config = DistributedConfig(fsdp_size=2, fsdp_plan={"model.layers.*.mlp": f"{strategy}_full_weight"})
        try:
            model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config)
            modules = {name: type(module).__name__ for name, module in model.named_modules() if "layers" in name}
            sharded = sorted(name for name, kind in modules.items() if kind.startswith("FSDP"))
            text = f"{len(sharded)}: {sharded}"
            wrong = wrong or len(sharded) != 4
        except RuntimeError as error:
            text, wrong = f"{type(error).__name__}: {error}", True
        if rank == 0:
            print(f"{strategy} inside free: expected 4 units in 2 layers, got {text}")
    torch.save(wrong, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
