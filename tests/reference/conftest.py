from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def claim() -> Iterator[Any]:
    """Return a function that claims to be a rank of a mesh of any shape, one after the other."""

    def mesh(rank: int, *shape: int, names: tuple[str, ...] | None = None) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        world = 1
        for size in shape:
            world *= size
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return init_device_mesh("cpu", shape, mesh_dim_names=names)

    yield mesh
    if dist.is_initialized():
        dist.destroy_process_group()
