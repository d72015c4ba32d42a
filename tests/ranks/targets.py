"""What ranks run in these tests. Imported on the ranks only."""

from __future__ import annotations


def _reduce(context, size=1):
    import torch
    import torch.distributed as dist

    tensor = torch.full((size,), float(context.rank + 1))
    dist.all_reduce(tensor)
    return tensor.tolist()


def good(context, extra=None):
    context.observe(2)
    total = _reduce(context)
    return {"total": total, "extra": extra, "rank": context.rank}
