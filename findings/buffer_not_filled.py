"""A buffer that only the enclosing model's `_init_weights` fills holds uninitialised memory after sharded loading.

Falcon-H1 multiplies its projections by `mup_vector`, a non-persistent buffer of each layer's mixer, filled from
the model that holds the layers. Fresh memory is filled with NaN here so that the result is the same every time.
"""

import sys
import tempfile

import torch
from transformers import FalconH1Config, FalconH1ForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    expected = FalconH1ForCausalLM.from_pretrained(folder)
    model = FalconH1ForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    ids = torch.arange(8).view(1, 8)
    losses = [each(input_ids=ids, labels=ids).loss.item() for each in (expected, model)]
    vectors = [each.model.layers[0].mamba.mup_vector.flatten()[::16].tolist() for each in (expected, model)]
    if rank == 0:
        print(f"mup_vector[::16]: expected {vectors[0]}\n                  actual   {vectors[1]}")
        print(f"loss: expected {losses[0]:.5f}, actual {losses[1]:.5f}")
    torch.save(vectors[0] != vectors[1], f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "mamba_d_ssm": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4}
    sizes |= {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        FalconH1ForCausalLM(FalconH1Config(**sizes)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
