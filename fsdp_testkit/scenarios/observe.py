"""Reading a model through torch's public API alone."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.scenarios.common import inner_model

#: Dtypes that numpy has.
_IN_NUMPY = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
)


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's dtype name without its prefix."""
    return str(dtype).removeprefix("torch.")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: the local shard of a DTensor, the tensor itself otherwise.

    A shard is part of no graph: with gradients on, DTensor would make a node of autograd for it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def tensor_data(tensor: torch.Tensor) -> TensorData:
    """Copy this rank's part of ``tensor`` into raw bytes."""
    plain = local(tensor)
    return TensorData(dtype_name(plain.dtype), tuple(plain.shape), raw(plain).tobytes())


def raw(plain: torch.Tensor) -> Any:
    """Return the elements of a plain tensor as a numpy array; as bytes where numpy has no such dtype."""
    if plain.dtype in _IN_NUMPY:
        return plain.numpy(force=True)
    return plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def canonical_names(model: nn.Module) -> dict[int, str]:
    """Map ``id(parameter)`` to its first FQN."""
    names: dict[int, str] = {}
    for name, parameter in inner_model(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Return global and local shape, dtype, device and placements of a parameter, gradient or state tensor."""
    facts: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "device": tensor.device.type,
        "dtensor": isinstance(tensor, DTensor),
    }
    if isinstance(tensor, DTensor):
        facts["placements"] = [_placement(item) for item in tensor.placements]
        facts["mesh"] = list(tensor.device_mesh.shape)
        facts["coordinate"] = list(tensor.device_mesh.get_coordinate() or [])
    facts["local_shape"] = list(local(tensor).shape)
    facts["meta"] = tensor.is_meta or local(tensor).is_meta
    return facts


def _placement(placement: Any) -> str:
    if placement.is_shard():
        return f"S{placement.dim}"
    if placement.is_replicate():
        return "R"
    return type(placement).__name__


def observe_parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe every distinct parameter, with the other FQNs of the same object as aliases."""
    names: dict[int, str] = {}
    result: dict[str, dict[str, Any]] = {}
    for name, parameter in inner_model(model).named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            result[names[id(parameter)]]["aliases"].append(name)
            continue
        names[id(parameter)] = name
        result[name] = describe(parameter) | {"requires_grad": parameter.requires_grad, "aliases": []}
    return result


def observe_buffers(model: nn.Module, evidence: Evidence, prefix: str = "buffer/") -> None:
    """Record values and facts of all buffers, persistent or not, under every name."""
    plain = inner_model(model)
    persistent = plain.state_dict(keep_vars=True).keys()
    facts: dict[str, Any] = {}
    for name, buffer in plain.named_buffers(remove_duplicate=False):
        facts[name] = describe(buffer) | {"persistent": name in persistent}
        if not facts[name]["meta"]:
            evidence.tensors[f"{prefix}{name}"] = tensor_data(buffer)
    evidence.facts["buffers"] = facts


def observe_units(model: nn.Module) -> list[dict[str, Any]]:
    """Find FSDP units by their effect: what ``unshard()`` of a module turns into plain tensors.

    Modules grouped in one unit answer with the same parameters and are reported together. The model has
    to be fully sharded; it is left so.
    """
    first: dict[int, str] = {}
    canonical = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    units: dict[tuple[str, ...], list[str]] = {}
    places = parameter_places(model)
    for fqn, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()
        # an unsharded parameter is another object than its DTensor: names, not ids, lead back to it
        plain = sorted({canonical.get(name, name) for name in plain_parameters(model, places)})
        module.reshard()
        units.setdefault(tuple(plain), []).append(fqn)
    return [{"parameters": list(parameters), "modules": modules} for parameters, modules in units.items()]


def reshard_all(model: nn.Module) -> None:
    """Bring every FSDP unit back to its sharded state."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameter_places(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return (FQN, module, name within it) of every parameter, under every name."""
    return [
        (f"{prefix}.{name}" if prefix else name, module, name)
        for prefix, module in inner_model(model).named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def plain_parameters(model: nn.Module, places: list[tuple[str, nn.Module, str]] | None = None) -> list[str]:
    """Return FQNs of parameters that are no DTensor right now; ``places`` are those of `parameter_places`."""
    return [
        fqn
        for fqn, module, name in (parameter_places(model) if places is None else places)
        if not isinstance(getattr(module, name), DTensor)
    ]


def observe_tensors(named: Iterable[tuple[str, torch.Tensor]], evidence: Evidence, prefix: str) -> None:
    """Record this rank's part of each tensor under ``prefix`` + name."""
    for name, tensor in named:
        evidence.tensors[f"{prefix}{name}"] = tensor_data(tensor)


def observe_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, evidence: Evidence, prefix: str = "optimizer/"
) -> None:
    """Record the state of every parameter, its group's options, and which parameters are bound.

    A parameter of the optimizer that is not the model's own object appears under ``unbound``.
    """
    names = canonical_names(model)
    groups: list[dict[str, Any]] = []
    unbound: list[list[Any]] = []
    for group in optimizer.param_groups:
        bound = []
        for parameter in group["params"]:
            if id(parameter) in names:
                bound.append(names[id(parameter)])
            else:
                unbound.append(list(parameter.shape))
        options = {key: value for key, value in group.items() if isinstance(value, (int, float, bool, tuple, list))}
        options.pop("params", None)
        groups.append({"options": options, "parameters": sorted(bound)})
    scalars: dict[str, dict[str, float]] = {}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            continue
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                evidence.tensors[f"{prefix}{name}/{key}"] = tensor_data(value)
            else:
                scalars.setdefault(name, {})[key] = float(value)
    evidence.facts["optimizer"] = {"groups": groups, "unbound": unbound, "scalars": scalars}


def digests(model: nn.Module) -> dict[str, str]:
    """Return a short digest of this rank's part of every parameter: equal digests mean equal bits."""
    return {
        name: hashlib.blake2b(np.ascontiguousarray(raw(local(parameter))).data, digest_size=8).hexdigest()
        for name, parameter in inner_model(model).named_parameters()
    }


def named_gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (FQN, gradient) of the parameters that have one."""
    for name, parameter in inner_model(model).named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad
