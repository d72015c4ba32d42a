"""What kind of model this is, told from its modules."""

from __future__ import annotations

import re
from typing import Any

_TOWER = re.compile(r"vision|audio|image|speech|vq")
_EXPERTS = re.compile(r"experts|\w*routed_experts|\w*moe\w*")
#: Parameters that only recurrent and convolutional mixers have.
_RECURRENT = re.compile(r"A_log|dt_bias|conv1d|rg_lru|\.conv\.|time_decay|mlstm")
#: Classes whose name ends in "attention" although they are recurrences.
_NO_ATTENTION = re.compile(r"rwkv|linearattention|lightningattention|deltaattention")


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
    if any(_EXPERTS.fullmatch(leaf) for leaf in leaves):
        return "moe"
    if not any(kind.endswith("attention") and not _NO_ATTENTION.search(kind) for kind in kinds):
        return "other"
    if any(_RECURRENT.search(name) for name, _ in model.named_parameters()):
        return "hybrid"
    config = getattr(model, "config", None)
    bert_like = hasattr(config, "is_decoder") and hasattr(config, "add_cross_attention")
    if bert_like or hasattr(config, "decoder_layers") or hasattr(config, "num_decoder_layers"):
        return "decoder"
    return "dense"
