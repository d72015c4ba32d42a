"""A sharded model with code of its own (trust_remote_code) is saved with torch's files in place of its own."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig): model_type = "mine"
class MineForCausalLM(LlamaForCausalLM): config_class = MineConfig
MineConfig.register_for_auto_class()
MineForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def rank_main(rank: int, folder: str) -> None:
    os.environ["HF_MODULES_CACHE"] = f"{folder}/modules{rank}"  # read when transformers is imported
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    options = {"trust_remote_code": True, "distributed_config": DistributedConfig(fsdp_size=2)}
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/whole", **options)
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    if rank == 0:
        for name in ("whole", "sharded"):
            named = json.loads(Path(folder, name, "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
            print(f"{name}: {named}, code: {', '.join(sorted(file.name for file in Path(folder, name).glob('*.py')))}")
        try:
            AutoModelForCausalLM.from_pretrained(f"{folder}/sharded", trust_remote_code=True)
        except Exception as error:
            print(f"loading it: {type(error).__name__}: {str(error)[:99]}")
        torch.save(named != "modeling_mine.MineForCausalLM", f"{folder}/wrong.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "modeling_mine.py").write_text(CODE)
        sys.path.append(folder)
        from modeling_mine import MineConfig, MineForCausalLM

        MineForCausalLM(MineConfig(hidden_size=64, num_hidden_layers=2)).save_pretrained(f"{folder}/whole")
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(torch.load(f"{folder}/wrong.pt"))
