"""A model saved in several files over one that was saved in one: `from_pretrained` loads the old weights, silently."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> int:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, wrong = LlamaForCausalLM(config), 0
    for sizes in (("20KB", "50GB"), ("20KB", "30KB"), ("50GB", "20KB")):
        with tempfile.TemporaryDirectory() as folder:
            for value, size in enumerate(sizes, start=1):
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.fill_(float(value))
                model.save_pretrained(folder, max_shard_size=size)
            loaded = {weight.unique().item() for weight in LlamaForCausalLM.from_pretrained(folder).parameters()}
            one = Path(folder, "model.safetensors").exists()
            files = len(list(Path(folder).glob("*.safetensors")))
        print(
            f"weights 1 saved in files of {sizes[0]}, then weights 2 of {sizes[1]}: "
            f"{files} files, model.safetensors {'among them' if one else 'gone'}, loaded {sorted(loaded)}"
        )
        wrong += loaded != {2.0}
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
