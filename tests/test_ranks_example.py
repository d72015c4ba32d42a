"""A collective tested in ten lines: the function runs on four ranks, and its asserts hold on each of them."""

from __future__ import annotations

import pytest


@pytest.mark.ranks(4)
@pytest.mark.parametrize("length", [1, 1000])
def test_reduce_scatter_sums_and_splits(rank: int, world_size: int, length: int) -> None:
    import torch
    import torch.distributed as dist

    mine = torch.arange(world_size * length) + rank
    part = torch.empty(length, dtype=torch.int64)
    dist.reduce_scatter_tensor(part, mine)
    assert part.tolist() == [4 * number + 6 for number in range(rank * length, (rank + 1) * length)]
