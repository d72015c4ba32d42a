"""Weights that a checkpoint conversion joins or splits along dim 0 are scrambled by sharded loading, silently."""

import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    expected = OlmoHybridForCausalLM.from_pretrained(folder)
    model = OlmoHybridForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    # each rank joins its slices of the stored q, k and v: together they hold q0 k0 v0 q1 k1 v1, and saving writes that
    name, ids = "model.layers.0.linear_attn.conv1d.weight", torch.arange(12).view(1, 12)
    truth, weight = expected.get_parameter(name), model.get_parameter(name).full_tensor()
    losses = [each(input_ids=ids, labels=ids).loss.item() for each in (expected, model)]
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    if rank == 0:
        print(f"{name}: {int((weight != truth).sum())} of {truth.numel()} values wrong after loading")
        print(f"  first channel of each 8: expected {[round(value, 3) for value in truth[::8, 0, 0].tolist()]}")
        print(f"                           actual   {[round(value, 3) for value in weight[::8, 0, 0].tolist()]}")
        print(f"loss: expected {losses[0]:.5f}, actual {losses[1]:.5f}")
    torch.save(not torch.equal(weight, truth), f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        OlmoHybridForCausalLM(OlmoHybridConfig(**sizes)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        before, after = (load_file(f"{folder}/{name}model.safetensors") for name in ("", "sharded/"))
        changed = sorted(name for name in before if not torch.equal(before[name], after[name]))
        print(f"load and save, no step between: changed {changed}")
        sys.exit(bool(changed) or any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
