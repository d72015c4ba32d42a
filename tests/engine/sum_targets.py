"""What the ranks of `test_order_of_sums.py` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.backends.ddp import DDPBackend
from fsdp_testkit.core.case import Case
from fsdp_testkit.scenarios.common import micro_batches, resolved


def averaged(context: Any, case: str, checkpoint: str, terms: list[float]) -> list[float]:
    """Return what DDP makes of a gradient whose elements are ``terms[rank]``."""
    context.observe()
    parsed = Case.from_json(case)
    config, model_class = resolved(parsed.model)
    model: Any = DDPBackend().load(
        Path(checkpoint), model_class=model_class, layout=parsed.layout, plan="auto", dtype=torch.float32
    )
    (batch, *_) = micro_batches(parsed, config, model_class, rank=context.rank, step=0)
    weight = model.module.model.norm.weight
    (0.0 * model(**batch.inputs).loss + (weight * terms[context.rank]).sum()).backward()
    return sorted(set(weight.grad.tolist()))
