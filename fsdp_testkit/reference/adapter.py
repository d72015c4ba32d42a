"""Every name that torch or transformers do not promise to keep, in one place.

Seen in torch 2.13.0 and transformers 5.23.0; `tests/reference/test_reference_adapter.py` notices when one moves.
"""

from __future__ import annotations

import copy
import functools
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

# torch.utils._python_dispatch: the underscore is historical, the class is documented in torch's dispatcher notes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import core_model_loading as _core
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.distributed import is_fsdp_enabled
from transformers.dynamic_module_utils import custom_object_save

__all__ = [
    "StorageInfo",
    "TorchDispatchMode",
    "TwinGroups",
    "apply_renamings",
    "changed_dims",
    "construct",
    "conversions",
    "filter_keys",
    "forget_meshes",
    "fp32_pattern",
    "mark_initialized",
    "moves_second_dim",
    "natural_order",
    "permutes_rows",
    "plain_class",
    "renamed",
    "reverse_renamed",
    "reversed_conversions",
    "seen_versions",
    "split_transforms",
    "stacks_rows",
    "tied_names",
    "tied_patterns",
    "unstacks_rows",
    "waits_for_rank0",
    "write_code",
    "written_arguments",
]


def forget_meshes() -> None:
    """Drop DTensor's memory of earlier meshes.

    It is keyed by a mesh's ranks and names: a mesh made after the process group was replaced finds the old one's
    results, and new tensors come out on a mesh whose groups are gone (or with another rank's coordinates). Under
    the same group nothing is dropped: to find the rules again costs more than a small model's training step.
    """
    global _world
    world = dist.group.WORLD
    if _world is None or world is None or _world() is not world:
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
        _gen_transform_infos.cache_clear()
        MeshTopoInfo.build_from_mesh.cache_clear()
        _twins.clear()
        _world = None if world is None else weakref.ref(world)


#: The process group that DTensor's memory, and `_twins`, are about.
_world: weakref.ref[Any] | None = None
#: (ranks, number) -> group: a group's threads and sockets stay until the end, so that one for each load would add up.
_twins: dict[tuple[tuple[int, ...], int], Any] = {}


class TwinGroups:
    """Groups of their own for parameters whose dtype is not the most common one of their unit.

    FSDP2 reduces the gradients of a unit as one buffer of one dtype. It divides a unit's parameters by the process
    group of their mesh, so a second process group over the same ranks gives them a buffer of their own.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.infos: dict[torch.dtype, FSDPMeshInfo] = {}

    def placements(self, modules: Iterable[str], model: nn.Module) -> Callable[[nn.Parameter], Any] | None:
        """Return the ``shard_placement_fn`` of the next unit; ``None`` where it has one dtype. Children come first.

        Makes process groups where it is not ``None`` and they were not made for an earlier model; all ranks of the
        mesh have to call it alike.
        """
        # units inside hold sharded parameters already
        own = {p for name in modules for p in model.get_submodule(name).parameters() if not isinstance(p, DTensor)}
        sizes: Counter[torch.dtype] = Counter()
        for parameter in own:
            sizes[parameter.dtype] += parameter.numel()
        rare = sorted(sizes, key=lambda dtype: (-sizes[dtype], str(dtype)))[1:]
        if not rare:
            return None
        for dtype in rare:
            if dtype not in self.infos:
                self.infos[dtype] = self._twin()
        chosen = {dtype: ShardPlacementResult(placement=None, mesh_info=self.infos[dtype]) for dtype in rare}
        return lambda parameter: chosen.get(parameter.dtype)

    def _twin(self) -> FSDPMeshInfo:
        if self.mesh.ndim == 1:
            info = FSDPMeshInfo(self.mesh, shard_mesh_dim=0)
        else:
            info = HSDPMeshInfo(self.mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
        ranks = dist.get_process_group_ranks(info.shard_process_group)
        known = (tuple(ranks), len(self.infos))
        if known not in _twins:
            _twins[known] = dist.new_group(ranks, use_local_synchronization=True)
        info.shard_process_group = _twins[known]
        return info


def construct(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return ``model_class(config)`` with ``dtype`` as default dtype, as ``from_pretrained`` builds it."""
    # AutoModel.from_config is the public way, but maps a config to one class only
    return model_class._from_config(config, dtype=dtype)


def plain_class(module: nn.Module) -> type:
    """Return the class that ``fully_shard`` replaced by its own subclass, or the class as it is."""
    cls = type(module)
    if isinstance(module, FSDPModule):
        # the mro is (FSDP<Name>, FSDPModule, <Name>, ...)
        return next(c for c in cls.__mro__[1:] if not issubclass(c, FSDPModule) and c is not object)
    return cls


def write_code(model: Any, config: Any, folder: Path) -> None:
    """Copy the code of a class that came from a checkpoint's folder into ``folder``, and name it in ``config``.

    ``save_pretrained`` does so by the class of the model, which for a sharded one lies in torch.
    """
    cls: Any = plain_class(model)
    if cls.is_remote_code():
        custom_object_save(cls.__new__(cls), folder, config)  # it asks for no more than the class


def fp32_pattern(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what parameter names keep fp32 when the model is loaded in ``dtype``, by the model's own rule."""
    names = list(model._get_dtype_plan(dtype))
    return _core.build_glob_alternation(names)[0] if names else None


def mark_initialized(tensor: torch.Tensor) -> None:
    """Tell the model's initialisation that this tensor has its value."""
    tensor._is_hf_initialized = True


def conversions(model: Any) -> list[Any]:
    """Return the weight transforms for loading into an unsharded ``model``, in the order of application."""
    return list(get_model_conversion_mapping(model))


def split_transforms(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return (renamings, converters)."""
    transforms = list(transforms)
    renamings = [t for t in transforms if isinstance(t, _core.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, _core.WeightConverter)]
    return renamings, converters


def renamed(
    key: str, renamings: list[Any], converters: list[Any], prefix: str, expected: dict[str, Any]
) -> tuple[str, str | None]:
    """Return (name in the model, source pattern of the converter that matched) for a key of a file."""
    name, pattern = _core.rename_source_key(key, renamings, converters, prefix, expected)
    if name not in expected and key in expected:
        # the key is the model's own already: a renaming that matched it was not meant for it
        name, pattern = _core.rename_source_key(key, [], [], prefix, expected)
    return name, pattern


def reversed_conversions(model: Any) -> list[Any]:
    """Return the transforms for saving: those that loading used, else the model's default ones, reversed."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        fresh = model
        if isinstance(model, FSDPModule):
            # fully_shard's subclass has another name and module, so that the lookup by class finds nothing
            with torch.device("meta"):
                fresh = construct(plain_class(model), copy.deepcopy(model.config), model.dtype)
        used = [
            t
            for t in get_model_conversion_mapping(fresh, add_legacy=False)
            # whether the checkpoint had the prefix is not known for a model that was not loaded
            if not isinstance(t, _core.PrefixChange)
        ]
    return [t.reverse_transform() for t in used[::-1]]


def reverse_renamed(key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
    """Return (name of the conversion group or file key, source pattern) for a name of the model."""
    name, pattern = _core.apply_converters(key, converters)
    return (name, pattern) if pattern is not None else (_core.apply_renamings(key, renamings), None)


def apply_renamings(key: str, renamings: list[Any]) -> str:
    """Return ``key`` after every renaming in turn."""
    name: str = _core.apply_renamings(key, renamings)
    return name


def natural_order(key: str) -> Any:
    """Sort key that puts layer 2 before layer 10; conversions rely on this order of experts."""
    return _core.dot_natural_key(key)


def stacks_rows(op: Any) -> bool:
    """Return whether ``op`` stacks a list of tensors along a new dim 0."""
    return type(op) is _core.MergeModulelist and op.dim == 0


def unstacks_rows(op: Any) -> bool:
    """Return whether ``op`` makes a tensor of each row (dim 0), in order, and all of one tensor before the next."""
    return type(op) is _core.SplitModulelist and op.dim == 0


def changed_dims(op: Any) -> set[int] | None:
    """Return the tensor dims that ``op`` rearranges; ``None`` when that is not known."""
    if type(op) in (_core.Concatenate, _core.Chunk, _core.Split, _core.Interleave):
        return {op.dim}
    if type(op) is _core.Transpose and not op.check_dims:
        return {op.dim0, op.dim1}
    return None


def moves_second_dim(op: Any) -> bool:
    """Return whether ``op`` only moves whole slices of dim 1 about, by their number alone."""
    return type(op) in (_core.Concatenate, _core.Chunk, _core.Split) and op.dim == 1


def permutes_rows(op: Any) -> bool:
    """Return whether ``op`` only moves whole rows (dim 0) about."""
    return type(op) is _core.PermuteForRope or changed_dims(op) == {0}


def filter_keys(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Return both sets without the keys that the model declares as ignorable."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def tied_patterns(model: nn.Module) -> list[str]:
    """Return the patterns of parameter names that the model declares as tied to another one."""
    patterns: list[str] = []
    for name, module in model.named_modules():
        declared = getattr(module, "_tied_weights_keys", None) or {}
        patterns += [f"{name}.{key}" if name else key for key in declared]
    return patterns


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return parameter name -> the name whose value it shares, as the model and its config have it."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def waits_for_rank0() -> bool:
    """Return whether transformers reads the environment as: only a node's first rank loads weights."""
    return bool(is_fsdp_enabled())


def written_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator changes in place; some (foreach) do not return them.

    Of a Python function, which has no schema, that is for its result to tell.
    """
    if not isinstance(function, torch._ops.OpOverload):
        return []
    written = _written_names(function)
    return [
        kwargs[name] if name in kwargs else args[index]
        for index, name in written
        if name in kwargs or index < len(args)
    ]


@functools.cache
def _written_names(function: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def seen_versions() -> dict[str, str]:
    """Return the versions that these names were seen in, and those at hand."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
