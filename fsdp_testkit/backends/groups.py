"""Device meshes, and what torch remembers of process groups that are gone."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from fsdp_testkit.core.layout import Layout

#: Meshes of the process group that is there now, by device, shape and axes.
_meshes: dict[Any, DeviceMesh] = {}
_world: weakref.ref[Any] | None = None


def mesh_of(layout: Layout) -> DeviceMesh:
    """Return the layout's mesh. A program makes one and keeps it: each new one would add process groups."""
    global _world
    world = dist.group.WORLD
    if _world is None or world is None or _world() is not world:
        _meshes.clear()
        _world = None if world is None else weakref.ref(world)
    key = (layout.device, layout.mesh_shape, layout.mesh_axes)
    if key not in _meshes:
        _meshes[key] = init_device_mesh(layout.device, layout.mesh_shape, mesh_dim_names=layout.mesh_axes)
    return _meshes[key]


@contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """Be ``rank`` of a group of other processes that do not exist; nothing of it is left afterwards."""
    # torch's own stand-in for such a group; it registers the backend called "fake"
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        forget_groups()
        yield
    finally:
        if dist.is_initialized():  # a group that did not come up may be there all the same
            dist.destroy_process_group()
        forget_groups()
        sys.excepthook = hook  # a group puts its rank before what an earlier hook says, and leaves that behind


def forget_groups() -> None:
    """Drop meshes of an earlier process group and what torch has cached about them.

    Call it with the new group set up, or with none.
    """
    from fsdp_testkit.reference.adapter import forget_meshes

    _meshes.clear()
    forget_meshes()
