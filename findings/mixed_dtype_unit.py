"""bf16 loading of a model with a parameter that stays in float32 beside bf16 ones: the first forward fails."""

import sys
import tempfile

import torch
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = torch.arange(8).view(1, 8)
    plain = HunYuanMoEV1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    kept = [name for name, parameter in plain.named_parameters() if parameter.dtype == torch.float32]
    expected = plain(input_ids=ids, labels=ids).loss.item()
    config = DistributedConfig(fsdp_size=2)
    model = HunYuanMoEV1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)
    try:
        actual, wrong = f"{model(input_ids=ids, labels=ids).loss.item():.4f}", False
    except AssertionError as error:
        actual, wrong = f"{type(error).__name__}: {error}", True
    if rank == 0:
        print(f"float32 in a bf16 model: {kept}\nloss: expected {expected:.4f}, actual {actual}")
    torch.save(wrong, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "moe_topk": 2}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**sizes)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
