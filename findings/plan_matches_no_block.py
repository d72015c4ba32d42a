"""The default plan names modules that some models do not have: GPT-2 becomes one unit, whole on every rank."""

import sys
import tempfile

import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

MODELS = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, tie_word_embeddings=False)),
}


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    wrong = False
    for name, (model_class, config) in MODELS.items():
        model = model_class.from_pretrained(f"{folder}/{name}", distributed_config=DistributedConfig(fsdp_size=2))
        units = [key for key, module in model.named_modules() if key and isinstance(module, FSDPModule)]
        model.unshard()  # the root unit alone: what no block unit holds stays whole during the step
        whole = sum(p.numel() for p in model.parameters() if not hasattr(p, "full_tensor"))
        total = GPT2LMHeadModel.num_parameters(model_class(config))
        wrong = wrong or len(units) < 4
        if rank == 0:
            print(f"{name}: plan {model.fsdp_plan}\n  {len(units)} units below the root: {units}")
            print(f"  parameters in the root unit: {whole} of {total}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(wrong))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for name, (model_class, config) in MODELS.items():
            model_class(config).save_pretrained(f"{folder}/{name}")
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
