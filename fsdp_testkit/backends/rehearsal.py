"""What is done in the process that ranks are forked from, for what it leaves in memory."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fsdp_testkit.backends.groups import fake_group, mesh_of
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.reference import units
from fsdp_testkit.reference.errors import PlanError
from fsdp_testkit.reference.plan import Plan

LAYOUTS = (Layout(kind="fsdp", shard=2, comm="fake"), Layout(kind="hsdp", replicate=2, shard=2, comm="fake"))


def rehearse() -> bool:
    """Train two linear layers with FSDP2 under fake process groups; return whether it was done.

    The first use of FSDP2, DTensor and a fused optimizer in a process fills tables that have nothing to do with the
    model: wrappers of functions, rules of operators, registrations. In ranks that live for a second or two it is about
    a tenth of the CPU time. What belongs to the fake groups, such as DTensor's memory of their meshes, is dropped.

    Does nothing in a torch that was built for an accelerator: autograd would start a thread for each device, and a
    process with threads cannot be forked. Draws no random number.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group: a rehearsal would use it")
    if torch.accelerator.current_accelerator(check_available=False) is not None:
        return False
    for layout in LAYOUTS:
        with fake_group(0, layout.world_size):
            _train(layout)
    return True


def read_sources(model: nn.Module) -> None:
    """Have the reference loader read the source that it looks for readers of weights in; ``model`` may be on meta."""
    with contextlib.suppress(PlanError):  # the load will say so
        units.resolve(Plan.parse("auto"), model)


def _train(layout: Layout) -> None:
    mesh = mesh_of(layout)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model(torch.zeros(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.full_tensor()
