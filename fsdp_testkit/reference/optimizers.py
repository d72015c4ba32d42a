"""Optimizers that were created before the model was sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fsdp_testkit.reference.errors import BindError


def bind_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, was: Any = None) -> None:
    """Put a sharded model's parameters in the place of those that an optimizer was created with.

    Groups keep their order and options; the state of each parameter goes with it: tensors of the parameter's shape
    are cut as the parameter is, each rank keeping its own part; scalars and others stay. The optimizer keeps no
    reference to an old parameter. Nothing is changed when an error is raised. No collective is called.

    Args:
        optimizer: any optimizer whose parameters are those of the model before it was sharded, on any device.
        model: the sharded model.
        was: what names the optimizer's parameters: the model before it was sharded, or its ``named_parameters()``
            (a dict, or pairs). Not needed for an optimizer that was created from ``model.named_parameters()``.

    Raises:
        BindError: a parameter has no name, or the sharded model has none of that name or shape, or one for two of
            the optimizer's; or a state tensor with data of its own has another shape than its parameter.
    """
    old = _names(optimizer, was)
    new = dict(model.named_parameters(remove_duplicate=False))
    pairs: dict[torch.Tensor, nn.Parameter] = {}
    problems = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            names = old.get(id(parameter), [])
            name = next((name for name in names if name in new), None)
            if name is None:
                problems.append(f"a parameter of shape {tuple(parameter.shape)} named {names or 'nowhere'} has no heir")
            elif new[name].shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)} in the optimizer, {tuple(new[name].shape)} in the model"
                problems.append(f"{name!r} has shape {shapes}")
            else:
                pairs[parameter] = new[name]
    heirs: dict[nn.Parameter, torch.Tensor] = {}
    for parameter, heir in pairs.items():
        if heir in heirs:
            both = sorted(name for one in (parameter, heirs[heir]) for name in old[id(one)])
            problems.append(f"{both} are tied in the model and two parameters in the optimizer: one would be lost")
        heirs[heir] = parameter
    states = {parameter: optimizer.state[parameter] for parameter in pairs if parameter in optimizer.state}
    made = {}
    for parameter, state in states.items():
        try:
            made[pairs[parameter]] = {key: _cut(value, pairs[parameter]) for key, value in state.items()}
        except ValueError as error:
            problems.append(f"state of {old[id(parameter)][0]!r}: {error}")
    if problems:
        raise BindError("the optimizer does not fit the model:", problems)
    for group in optimizer.param_groups:
        group["params"] = [pairs[parameter] for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(made)


def _names(optimizer: torch.optim.Optimizer, was: Any) -> dict[int, list[str]]:
    """Return id of a parameter -> its names."""
    pairs: Iterable[tuple[str, torch.Tensor]]
    if isinstance(was, nn.Module):
        pairs = was.named_parameters(remove_duplicate=False)
    elif was is not None:
        pairs = was.items() if isinstance(was, Mapping) else was
    else:
        groups = optimizer.param_groups
        if not all("param_names" in group for group in groups):
            raise BindError("the optimizer does not know its parameters' names; pass was=model.named_parameters()")
        pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    found: dict[int, list[str]] = {}
    for name, parameter in pairs:
        found.setdefault(id(parameter), []).append(name)
    return found


def _cut(value: Any, parameter: torch.Tensor) -> Any:
    """Return this rank's part of a state tensor that is shaped as the parameter is; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} cannot be cut as {tuple(parameter.shape)} is")
    if not isinstance(parameter, DTensor):
        return value
    part = value
    for axis, placement in enumerate(parameter.placements):
        if placement == Replicate():
            continue
        if placement != Shard(0):
            raise ValueError(f"placements {parameter.placements} are not cut along dim 0")
        mesh = parameter.device_mesh
        pieces = torch.chunk(part, mesh.size(axis))
        own = mesh.get_local_rank(axis)
        part = pieces[own] if own < len(pieces) else part[:0]
    local = parameter.to_local()
    # a copy: a view would keep the whole tensor alive
    part = part.to(device=local.device, copy=True).contiguous()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
