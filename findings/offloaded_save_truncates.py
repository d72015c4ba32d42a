"""An offloaded model whose weights are joined on save comes out truncated where a group falls into two files.

HRM-Text stores gate, q, k and v of an attention as one tensor. `save_pretrained` of an offloaded model converts file
by file, and joins those of a group that are in the file at hand: the last file's part is left of the whole.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import HrmTextConfig, HrmTextForCausalLM


def stored(folder: str) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(file).items()}


def main() -> int:
    config = HrmTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_layers_per_stack=1, num_attention_heads=4, head_dim=8
    )
    torch.manual_seed(0)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that memory has to be large enough for a file
        HrmTextForCausalLM(config).save_pretrained(f"{folder}/plain")
        expected = stored(f"{folder}/plain")
        for place, size in (("memory", "8KB"), ("disk", "50GB"), ("disk", "8KB")):
            where = "on disk" if place == "disk" else "in memory"
            devices = {"device_map": {"": "disk"}, "offload_folder": f"{folder}/offload"} if place == "disk" else {}
            model = HrmTextForCausalLM.from_pretrained(f"{folder}/plain", **devices)
            try:
                model.save_pretrained(f"{folder}/{place}-{size}", max_shard_size=size)
            except RuntimeError as error:
                print(f"weights {where}, files of {size}: refused, {str(error)[:80]}")
                continue
            actual = stored(f"{folder}/{place}-{size}")
            bad = {
                key: (expected[key].shape, actual[key].shape)
                for key in expected
                if len(expected[key]) != len(actual[key])
            }
            print(f"weights {where}, files of {size}: {len(bad)} of {len(expected)} tensors truncated, no error")
            for key, (whole, rest) in list(bad.items())[:2]:
                print(f"  {key}: expected {list(whole)}, stored {list(rest)}")
            wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
