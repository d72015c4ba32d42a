"""A sharded model with code of its own (trust_remote_code) is saved with torch's files in place of its own."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
NAMES = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def rank_main(rank: int, folder: str) -> None:
    os.environ["HF_MODULES_CACHE"] = f"{folder}/modules{rank}"  # read when transformers is imported
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    if rank == 0:
        config = AutoConfig.from_pretrained(f"{folder}/mine", trust_remote_code=True, num_hidden_layers=2)
        AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(f"{folder}/whole")
    dist.barrier()
    options = {"trust_remote_code": True, "distributed_config": DistributedConfig(fsdp_size=2)}
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/whole", **options)
    model.save_pretrained(f"{folder}/sharded", is_main_process=rank == 0)
    dist.barrier()  # nobody leaves before all is written
    for name in ("whole", "sharded") if rank == 0 else ():
        files = sorted(file.name for file in Path(folder, name).glob("*.py"))
        print(f"{name}: {auto_map(folder, name)}, code: {', '.join(files)}")
    if rank == 0:
        try:
            AutoModelForCausalLM.from_pretrained(f"{folder}/sharded", trust_remote_code=True)
        except Exception as error:
            print(f"loading it: {type(error).__name__}: {str(error)[:99]}")
    dist.destroy_process_group()


def auto_map(folder: str, name: str) -> str:
    return json.loads(Path(folder, name, "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mine").mkdir()
        Path(folder, "mine", "modeling_mine.py").write_text(CODE)
        Path(folder, "mine", "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": NAMES, **SIZES}))
        mp.spawn(rank_main, args=(folder,), nprocs=2)
        return int(auto_map(folder, "sharded") != auto_map(folder, "whole"))


if __name__ == "__main__":
    sys.exit(main())
