"""Which parameters stay without a gradient in a text-only training step, and why.

Everything else has to have a gradient that is not zero. Patterns are searched in the parameter's name.
"""

from __future__ import annotations

import re

#: Model type -> pattern of parameters whose ``grad`` stays ``None``.
NO_GRADIENT: dict[str, str] = {
    # the indexer picks keys by top-k, which has no derivative; training it takes a loss of its own
    "glm_moe_dsa": r"\.indexer\.",
}

#: Model type -> pattern of parameters whose gradient is zero although they take part.
ZERO_GRADIENT: dict[str, str] = {
    # without jitter the sparse mixer masks all but the best expert, so the routing weight is the constant 1
    "phimoe": r"\.router\.",
}


def expects_no_gradient(model_type: str, name: str) -> bool:
    """Return whether the parameter's ``grad`` stays ``None``."""
    return _found(NO_GRADIENT, model_type, name)


def expects_zero_gradient(model_type: str, name: str) -> bool:
    """Return whether the parameter's gradient is zero everywhere."""
    return _found(ZERO_GRADIENT, model_type, name)


def _found(table: dict[str, str], model_type: str, name: str) -> bool:
    pattern = table.get(model_type)
    return pattern is not None and re.search(pattern, name) is not None
