"""Loading per-expert weights fails on a rank that owns no expert: there is nothing to stack."""

import io
import logging
import sys
import tempfile

import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

RANKS = 4


def rank_main(rank: int, folder: str, experts: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    log = io.StringIO()
    transformers_logging.get_logger("transformers").addHandler(logging.StreamHandler(log))
    try:
        config = DistributedConfig(fsdp_size=RANKS)
        model = MixtralForCausalLM.from_pretrained(folder, distributed_config=config)
        weight = model.model.layers[0].mlp.experts.down_proj
        result = f"loaded, local shape {tuple(weight.to_local().shape)} of {tuple(weight.shape)}"
    except RuntimeError as error:
        causes = [line.strip() for line in log.getvalue().splitlines() if "non-empty" in line]
        result = f"{type(error).__name__}: {str(error)[:60]}... / {causes[0] if causes else ''}"
    results: list[str] = [""] * RANKS
    dist.all_gather_object(results, result)
    if rank == 0:
        print(
            f"{experts} experts on {RANKS} ranks",
            *(f"  rank {i}: {r}" for i, r in enumerate(results)),
            sep="\n",
            flush=True,
        )
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(any("loaded" not in result for result in results)))


def main() -> int:
    status = 0
    for experts in (4, 5):
        config = MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=experts,
        )
        with tempfile.TemporaryDirectory() as folder:
            MixtralForCausalLM(config).save_pretrained(folder)
            try:
                mp.spawn(rank_main, args=(folder, experts), nprocs=RANKS)
            except mp.ProcessExitedException as error:
                status = int(error.exit_code or 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
