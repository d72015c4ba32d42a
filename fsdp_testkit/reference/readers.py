"""Which modules read the parameters of modules inside of them, told from their source.

FSDP2 gathers a unit when its module's forward is entered. A weight that a forward further out reads itself
(``self.embed_tokens.weight[pad]``) is not gathered then, so it must not lie in a unit of its own.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

from fsdp_testkit.reference import adapter

#: What may follow a weight without reading its values.
_FACTS = r"(?!\.(dtype|device|shape|size|ndim|is_\w+|requires_grad)\b)"


def outermost_reader(model: nn.Module, name: str, *, anywhere: bool) -> str | None:
    """Return the outermost module around ``name`` that reads the tensors which ``name`` directly holds.

    Args:
        model: the model; ``""`` is its name as a reader.
        name: a module's name.
        anywhere: look into all methods of the modules around it, also those that a training step need not enter;
            else into ``forward`` only.

    Returns:
        its name; ``None`` where there is no such module, or where no source can be had.
    """
    parts = name.split(".")
    leaves = "|".join(re.escape(leaf) for leaf, _ in model.get_submodule(name).named_parameters(recurse=False))
    if not leaves:
        return None
    for depth in range(len(parts)):
        around = ".".join(parts[:depth])
        start = f"self.{'.'.join(parts[depth:])}."
        text = _source(adapter.plain_class(model.get_submodule(around)), anywhere)
        # the source of a model's bases is long, and an expression of its own for each module costs more than the search
        if start in text and re.search(rf"\b{re.escape(start)}({leaves})\b{_FACTS}", text):
            return around
    return None


@cache
def _source(cls: type, anywhere: bool) -> str:
    functions = [item for base in cls.__mro__ if base is not nn.Module for item in vars(base).values()]
    chosen: list[Any] = [item for item in functions if inspect.isfunction(item)] if anywhere else [cls.forward]  # type: ignore[attr-defined]
    texts = []
    for function in chosen:
        try:
            texts.append(inspect.getsource(inspect.unwrap(function)))
        except (OSError, TypeError):  # made at run time: nothing to read
            continue
    return "\n".join(texts)
