"""Loading per-expert weights fails on a rank that owns no expert: there is nothing to stack."""

import io
import logging
import sys
import tempfile

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str, experts: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    log, results = io.StringIO(), [""] * 4
    logging.getLogger("transformers").addHandler(logging.StreamHandler(log))
    try:
        model = MixtralForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=4))
        weight = model.model.layers[0].mlp.experts.down_proj
        result = f"loaded, local shape {tuple(weight.to_local().shape)} of {tuple(weight.shape)}"
    except RuntimeError as error:
        causes = [line.strip() for line in log.getvalue().splitlines() if "non-empty" in line]
        result = f"{type(error).__name__}: {str(error)[:60]}... / {causes[0] if causes else ''}"
    torch.distributed.all_gather_object(results, result)
    if rank == 0:
        print(f"{experts} experts on 4 ranks", *(f"  rank {i}: {result}" for i, result in enumerate(results)), sep="\n")
    torch.save("loaded" not in result, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    wrong = False
    for experts in (4, 5):
        with tempfile.TemporaryDirectory() as folder:
            MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts)).save_pretrained(folder)
            torch.multiprocessing.spawn(rank_main, args=(folder, experts), nprocs=4)
            wrong = wrong or any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(4))
    sys.exit(wrong)
