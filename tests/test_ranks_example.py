"""A collective tested in ten lines: the function runs on four ranks, and its asserts hold on each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fsdp_testkit import per_rank


@pytest.mark.ranks(4)
@pytest.mark.parametrize("length", [1, 1000])
def test_reduce_scatter_sums_and_splits(rank: int, world_size: int, length: int) -> None:
    import torch
    import torch.distributed as dist

    mine = torch.arange(world_size * length) + rank
    part = torch.empty(length, dtype=torch.int64)
    dist.reduce_scatter_tensor(part, mine)
    assert part.tolist() == [4 * number + 6 for number in range(rank * length, (rank + 1) * length)]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sent", [per_rank([[1, 2], [3]]), per_rank([[], [4]])])
def test_lists_of_all_ranks_arrive(rank: int, sent: list[int], subtests: pytest.Subtests) -> None:
    import torch.distributed as dist

    parts: list[list[int]] = [[], []]
    dist.all_gather_object(parts, sent)
    with subtests.test("own part", rank=rank):
        assert parts[rank] == sent


def gathered(rank: int, number: int) -> list[int]:
    import torch
    import torch.distributed as dist

    parts = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([number + rank]))
    return [int(part) for part in parts]


def test_what_each_rank_returns(on_ranks: Callable[..., list[list[int]]]) -> None:
    assert on_ranks(gathered, 2, number=per_rank([10, 20])) == [[10, 21]] * 2
