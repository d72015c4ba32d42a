"""Which parameters stay without a gradient in a text-only training step, and why.

Everything else that requires a gradient has to get one that is not zero.
"""

from __future__ import annotations

import re

#: Parameters whose ``grad`` stays ``None`` in every model type, where they require one at all.
_EVERYWHERE = (
    # decoders of encoder-decoders get no encoder states
    r"\b(encoder_attn|cross_attn)(_layer_norm)?\b|\bcrossattention\b",
    # towers see no pixels and no sound
    r"(^|\.)(vision|audio|image)_|multi_modal_projector|embed_(vision|audio)",
    # indexers pick keys by top-k, which has no derivative; training them takes a loss of its own
    r"indexer",
)

#: Where that does not hold for a model type: the whole pattern instead.
_INSTEAD: dict[str, str] = {
    # the patcher finds the borders of patches by entropy, without a gradient
    "blt": r"\.patcher\.",
    # its batches have pixels
    "git": r"(?!)",
    # a layer with cross-attention is skipped whole when there is no image
    "mllama": r"\.layers\.1\.",
}

#: Further parameters of a model type.
_FURTHER: dict[str, str] = {
    "big_bird": r"\.pooler\.",  # built by default, used by classifiers only
    "marian": r"\.embed_positions\.",  # a fixed sinusoidal table that is a parameter
    "pegasus": r"\.embed_positions\.",
    "roformer": r"\.embed_positions\.",
    "reformer": r"^lm_head\.bias$",  # registered twice; the other name gets the gradient
    "xlnet": r"\.(r_s_bias|seg_embed|mask_emb)$",  # segments and permutation masks are not in a text batch
}

#: Model type -> parameters whose gradient is zero although they take part.
_ZERO: dict[str, str] = {
    # without jitter the sparse mixer masks all but the best expert, so the routing weight is the constant 1
    "phimoe": r"\.router\.",
}

#: Model type -> dtypes that its own forward fails in on a CPU, and how. float32 works for all.
UNSUPPORTED_DTYPES: dict[str, dict[str, str]] = {
    "inkling2_text": {"float64": "adds float32 and float64 matrices"},
    "reformer": {"bfloat16": "mixes float32 and bfloat16 in a norm"},
    "xglm": {"float64": "fills a mask with a number that only float64 can hold"},
    "xlnet": {"bfloat16": "multiplies with float32 positions", "float64": "multiplies with float32 positions"},
    "xlstm": {"bfloat16": "multiplies float32 with bfloat16"},
}

#: Dropout that is drawn from a fresh random seed in each forward: a run with dropout cannot be repeated.
UNREPEATABLE_DROPOUT: dict[str, str] = {"reformer": "its reversible layers seed themselves with torch.seed()"}


def runs_in(model_type: str, dtype: str) -> bool:
    """Return whether the model's forward runs in ``dtype`` (``float32``, ``float64``, ``bfloat16``) on a CPU."""
    return dtype not in UNSUPPORTED_DTYPES.get(model_type, {})


def expects_no_gradient(model_type: str, name: str) -> bool:
    """Return whether the parameter's ``grad`` stays ``None`` although it may require one."""
    pattern = _INSTEAD.get(model_type, "|".join(_EVERYWHERE))
    further = _FURTHER.get(model_type)
    return re.search(pattern, name) is not None or (further is not None and re.search(further, name) is not None)


def expects_zero_gradient(model_type: str, name: str) -> bool:
    """Return whether the parameter's gradient is zero everywhere."""
    pattern = _ZERO.get(model_type)
    return pattern is not None and re.search(pattern, name) is not None
