"""A tied model cannot be saved as a distributed checkpoint once its weights are not mapped from a file."""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config, failed = DistributedConfig(fsdp_size=2), False
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            model = LlamaForCausalLM.from_pretrained(f"{folder}/{tied}", dtype=dtype, distributed_config=config)
            said = "saved"
            try:
                model.save_pretrained(f"{folder}/{tied}-{dtype}", distributed_checkpoint=True)
            except BaseException as error:  # torch's CheckpointException is no Exception
                failed, said = True, f"{type(error).__name__}, " + str(error).split("RuntimeError:")[-1].strip()[:25]
            if rank == 0:
                print(f"tied {tied}, float32 file loaded as {dtype}: {said}")
    torch.save(failed, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        for tied in (False, True):
            config = LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=tied)
            LlamaForCausalLM(config).save_pretrained(f"{folder}/{tied}")
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
