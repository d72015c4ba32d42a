"""The default plan names modules that some models do not have: GPT-2 becomes one unit, whole on every rank."""

import sys
import tempfile

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrong = False
    for name in ("llama", "gpt2"):
        config = DistributedConfig(fsdp_size=2)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config)
        total = model.num_parameters()
        units = [key for key, module in model.named_modules() if key and isinstance(module, FSDPModule)]
        model.unshard()  # the root unit alone: what no block unit holds stays whole during the step
        whole = sum(weight.numel() for weight in model.parameters() if not hasattr(weight, "full_tensor"))
        wrong = wrong or len(units) < 4
        if rank == 0:
            print(f"{name}: plan {model.fsdp_plan}\n  {len(units)} units below the root: {units}")
            print(f"  parameters in the root unit: {whole} of {total}")
    torch.save(wrong, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    llama = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    gpt2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "tie_word_embeddings": False}
    configs = {"llama": LlamaConfig(**llama, num_attention_heads=2), "gpt2": GPT2Config(**gpt2)}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/{name}")
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
