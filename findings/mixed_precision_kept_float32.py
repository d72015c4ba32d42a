"""`fsdp_mixed_precision=True` runs modules that a model keeps in float32 in bfloat16, silently."""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    ids, seen = torch.arange(8).view(1, 8), {}
    for mixed in (False, True):
        config = DistributedConfig(fsdp_size=2, fsdp_mixed_precision=mixed)
        model = Ernie4_5_MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)
        gate = model.model.layers[-1].mlp.gate
        gate.register_forward_pre_hook(  # runs after the unit has gathered its weight
            lambda module, _, key=mixed: seen.update({key: (module.weight.dtype, module.weight.detach().clone())})
        )
        stored = gate.weight.full_tensor()
        with torch.no_grad():
            model(input_ids=ids)
        if rank == 0:
            dtype, used = seen[mixed]
            loss = (used.float() - stored).abs().max().item()
            print(f"fsdp_mixed_precision={mixed}: gate.weight stored in {stored.dtype}, used in {dtype}", end=", ")
            print(f"largest rounding {loss:.2e}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(seen[True][0] != torch.float32))


def main() -> int:
    config = Ernie4_5_MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=1,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Ernie4_5_MoeForCausalLM(config).save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
