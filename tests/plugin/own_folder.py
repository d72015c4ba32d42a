"""A folder with a model of its own code, as somebody would keep one: nothing of it is known to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGURATION = """
from transformers import PreTrainedConfig


class FoldedConfig(PreTrainedConfig):
    model_type = "folded"
    vocab_size: int = 67
    hidden_size: int = 20
    num_hidden_layers: int = 2
    dropout: float = 0.1
    tie_word_embeddings: bool = False
"""

MODELING = '''
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_folded import FoldedConfig


class FoldedBlock(nn.Module):
    """Each token sees the mean of those before it."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.down = nn.Linear(3 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden):
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        mean = self.norm(hidden).cumsum(1) / counts[:, None]
        hidden = hidden + torch.tanh(self.mix(mean))
        return hidden + self.dropout(self.down(torch.nn.functional.gelu(self.up(hidden))))


class FoldedForCausalLM(PreTrainedModel):
    config_class = FoldedConfig
    config: FoldedConfig
    base_model_prefix = ""
    _no_split_modules = ["FoldedBlock"]
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FoldedBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None, **_):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.lm_head(self.norm(hidden))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
'''

#: A line that tells whoever asks that the code was run.
TELL = "\nfrom pathlib import Path\nPath({mark!r}).touch()\n"

CONFIG: dict[str, Any] = {
    "model_type": "folded",
    "architectures": ["FoldedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_folded.FoldedConfig",
        "AutoModelForCausalLM": "modeling_folded.FoldedForCausalLM",
    },
    "hidden_size": 24,
    "num_hidden_layers": 3,
}


def write_folder(folder: Path, *, mark: Path | None = None, **changes: Any) -> Path:
    """Write the folder and return it.

    Args:
        folder: is made.
        mark: a file that comes into being when the code is run.
        changes: of its ``config.json``; ``None`` leaves a key out.
    """
    folder.mkdir()
    tell = TELL.format(mark=str(mark)) if mark is not None else ""
    (folder / "configuration_folded.py").write_text(CONFIGURATION + tell)
    (folder / "modeling_folded.py").write_text(MODELING + tell)
    values = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
