"""What spawned ranks run."""

from __future__ import annotations

import os
from typing import Any

from fsdp_testkit.core.case import Case
from fsdp_testkit.models.build import meta_model


def parameters(context: Any, *, case: str) -> list[Any]:
    """Return the class of a case's model, its number of parameters, and where transformers keeps its code."""
    model = meta_model(Case.from_json(case).model)
    context.observe()
    return [type(model).__name__, sum(item.numel() for item in model.parameters()), os.environ["HF_MODULES_CACHE"]]
