"""Weights that a checkpoint conversion joins or splits along dim 0 are scrambled by sharded loading, silently.

OLMo-Hybrid stores the kernels of q, k and v apart and joins them on load. Each rank reads its slice of q, of k
and of v and joins these, so the ranks together hold q0 k0 v0 q1 k1 v1 instead of q k v; saving writes that.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM
from transformers.distributed import DistributedConfig

NAME = "model.layers.0.linear_attn.conv1d.weight"


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    expected = OlmoHybridForCausalLM.from_pretrained(folder)
    model = OlmoHybridForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    weight, truth = model.get_parameter(NAME).full_tensor(), expected.get_parameter(NAME)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        losses = [each(input_ids=ids, labels=ids).loss.item() for each in (expected, model)]
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    if rank == 0:
        before, after = load_file(f"{folder}/model.safetensors"), load_file(f"{folder}/sharded/model.safetensors")
        changed = sorted(name for name in before if not torch.equal(before[name], after[name]))
        print(f"{NAME}: {int((weight != truth).sum())} of {truth.numel()} values wrong after loading")
        print(f"  first channel of each 8: expected {[round(v, 3) for v in truth[::8, 0, 0].tolist()]}")
        print(f"                           actual   {[round(v, 3) for v in weight[::8, 0, 0].tolist()]}")
        print(f"loss: expected {losses[0]:.5f}, actual {losses[1]:.5f}")
        print(f"load and save, no step between: changed {changed}", flush=True)
        torch.save(bool(changed) or not torch.equal(weight, truth), f"{folder}/wrong.pt")
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()


def main() -> int:
    config = OlmoHybridConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        OlmoHybridForCausalLM(config).save_pretrained(folder)
        mp.spawn(rank_main, args=(folder,), nprocs=2)
        return int(torch.load(f"{folder}/wrong.pt"))


if __name__ == "__main__":
    sys.exit(main())
