"""bf16 loading of a model with a parameter that stays in float32 beside bf16 ones: the first forward fails."""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
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
        print(f"float32 in a bf16 model: {kept}\nloss: expected {expected:.4f}, actual {actual}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(wrong))


def main() -> int:
    config = HunYuanMoEV1Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        moe_topk=2,
        head_dim=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        HunYuanMoEV1ForCausalLM(config).save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
