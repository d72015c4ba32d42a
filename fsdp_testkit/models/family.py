"""What kind of model this is, told from its modules."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_RECURRENT = re.compile(
    r"mamba|ssm|recurrent|rwkv|lstm|linear_attn|linearattention|gateddelta|shortconv|conv$|kda|lightning"
)
_TOWER = re.compile(r"vision|audio|image|speech|vq")


def family(model: Any) -> str:
    """Return ``dense``, ``moe``, ``hybrid``, ``decoder``, ``multimodal`` or ``other``: the first that fits.


    * ``multimodal``: has a vision or audio tower;
    * ``moe``: has experts;
    * ``hybrid``: has both attention and recurrent or convolution mixers;
    * ``decoder``: the decoder half of an encoder-decoder, or a BERT-like encoder used as one;
    * ``dense``: has attention; ``other``: has none.
    """
    modules = [(name, module) for name, module in model.named_modules() if name]
    leaves = {name.rsplit(".", 1)[-1].lower() for name, _ in modules}
    kinds = {type(module).__name__.lower() for _, module in modules}
    if any(_TOWER.search(leaf) for leaf in leaves):
        return "multimodal"
    if any(re.fullmatch(r"experts|\w*routed_experts|\w*moe\w*", leaf) for leaf in leaves):
        return "moe"
    attention = any(re.search(r"attention|attn", kind) and not _RECURRENT.search(kind) for kind in kinds)
    if not attention:
        return "other"
    if any(_RECURRENT.search(kind) for kind in kinds if not kind.startswith("conv1d")):
        return "hybrid"
    config = getattr(model, "config", None)
    if hasattr(config, "add_cross_attention") or hasattr(config, "decoder_layers"):
        return "decoder"
    return "dense"


def has_experts(model: nn.Module) -> bool:
    """Return whether any module holds experts."""
    return any(name.rsplit(".", 1)[-1] == "experts" for name, _ in model.named_modules())
