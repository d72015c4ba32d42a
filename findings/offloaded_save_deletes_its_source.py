"""Saving an offloaded model to the folder it was loaded from deletes the weights before they are read.

`save_pretrained` removes the weight files that it will not write again, and then fetches the offloaded weights, some
of which lie in these files.
"""

import sys
import tempfile
import warnings
from pathlib import Path

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def stored(folder: str) -> set[str]:
    return {key for file in Path(folder).glob("*.safetensors") for key in load_file(file)}


config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
lost = 0
warnings.simplefilter("ignore")  # that memory has to be large enough for a file
for before, after in (("20KB", "20KB"), ("20KB", "50GB"), ("20KB", "30KB"), ("50GB", "20KB")):
    with tempfile.TemporaryDirectory() as folder:
        saved, devices = f"{folder}/model", {"device_map": {"": "disk"}, "offload_folder": f"{folder}/offload"}
        LlamaForCausalLM(config).save_pretrained(saved, max_shard_size=before)
        expected = stored(saved)
        model = LlamaForCausalLM.from_pretrained(saved, **devices)
        error = "no error"
        try:
            model.save_pretrained(saved, max_shard_size=after)
        except Exception as caught:
            error = f"{type(caught).__name__}: {str(caught).split(folder)[-1]}"
        missing = expected - stored(saved)
    print(f"files of {before}, saved over as {after}: {len(missing)} of {len(expected)} tensors lost, {error}")
    lost += len(missing)
sys.exit(lost > 0)
