"""A manual plan that keeps a module inside a freed block cannot be applied: parents are wrapped before children."""

import sys
import tempfile

import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

PLANS = {
    "free inside free": {"model.layers.*.mlp": "free_full_weight"},
    "keep inside free": {"model.layers.*.mlp": "keep_full_weight"},
}


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    wrong = False
    for name, plan in PLANS.items():
        try:
            config = DistributedConfig(fsdp_size=2, fsdp_plan=plan)
            model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config)
            sharded = [n for n, m in model.named_modules() if type(m).__name__.startswith("FSDP") and "layers" in n]
            text = f"expected 4 units in 2 layers, got {len(sharded)}: {sorted(sharded)}"
            wrong = wrong or len(sharded) != 4
        except RuntimeError as error:
            text, wrong = f"expected 4 units in 2 layers, got {type(error).__name__}: {error}", True
        if rank == 0:
            print(f"{name}: {text}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(wrong))


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
