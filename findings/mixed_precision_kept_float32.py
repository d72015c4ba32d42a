"""`fsdp_mixed_precision=True` runs modules that a model keeps in float32 in bfloat16, silently."""

import sys
import tempfile

import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for mixed in (False, True):
        config = DistributedConfig(fsdp_size=2, fsdp_mixed_precision=mixed)
        model = Ernie4_5_MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)
        gate = model.model.layers[-1].mlp.gate
        stored, used = gate.weight.full_tensor(), []
        # the hook runs after the unit has gathered its weight
        gate.register_forward_pre_hook(lambda module, _, used=used: used.append(module.weight.detach().clone()))
        model(input_ids=torch.arange(8).view(1, 8))
        if rank == 0:
            loss = (used[0].float() - stored).abs().max().item()
            line = f"fsdp_mixed_precision={mixed}: gate.weight stored in {stored.dtype}, used in {used[0].dtype}"
            print(f"{line}, largest rounding {loss:.2e}")
    torch.save(used[0].dtype != torch.float32, f"{folder}/wrong{rank}.pt")  # with mixed precision
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "moe_k": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**sizes)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
