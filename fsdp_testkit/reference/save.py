"""`save_sharded`: standard safetensors, or a DCP folder, from a sharded model."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import adapter, dcp, folders
from fsdp_testkit.reference.errors import SaveError
from fsdp_testkit.reference.files import INDEX, SINGLE

LAYOUTS = ("safetensors", "dcp")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(slots=True)
class SaveGroup:
    """Tensors of the model that together make one or several tensors of the files.

    Attributes:
        name: the conversion's first target, or the one key of the file.
        sources: (source pattern, name in the model).
        transform: transformers' reverse converter, or ``None`` for a plain copy.
        outputs: key in the file -> bytes.
    """

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    transform: Any = None
    outputs: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(self.outputs.values())

    def convert(self, tensors: dict[str, torch.Tensor], model: Any, renamings: list[Any]) -> dict[str, torch.Tensor]:
        """Return key in the file -> tensor, from model name -> tensor."""
        if self.transform is None:
            return {self.name: tensors[self.sources[0][1]]}
        transform = copy.deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.name, name, pattern, tensors[name])
        with torch.no_grad():
            made = transform.convert(self.name, model=model, config=model.config)
        return {
            adapter.apply_renamings(key, renamings): value[0] if isinstance(value, list) else value
            for key, value in made.items()
        }


def save_sharded(
    model: Any, folder: str | Path, *, layout: str = "safetensors", max_shard_size: int | str = "5GB"
) -> None:
    """Save a (sharded or plain) transformers model; every rank must call this.

    ``safetensors``: what a single-process ``save_pretrained`` of the same model would hold: the same keys,
    dtypes and values, converted back to the checkpoint's own format, tied keys once. Plain ``from_pretrained``
    reads it. ``dcp``: `torch.distributed.checkpoint` files, written by all ranks, with the model's own names;
    `load_sharded` reads them on any mesh. Both come with ``config.json`` and the generation config.

    The folder is written beside and renamed, so that a failure leaves an older checkpoint whole. Files in an
    older folder that are no part of a checkpoint (a tokenizer, say) are kept; an older training state is not.

    Args:
        model: a ``PreTrainedModel``, its parameters `DTensor`s or plain tensors.
        folder: target folder; made if missing.
        layout: ``"safetensors"`` or ``"dcp"``.
        max_shard_size: bytes, or text such as ``"5GB"``: a file is closed before it grows beyond. What one
            conversion makes stays in one file, whatever its size.

    Raises:
        SaveError: an argument is not one of these, parameters are shared that the model does not declare as
            tied, or the folder is a file. All ranks raise.
    """
    if layout not in LAYOUTS:
        raise SaveError(f"layout={layout!r} must be one of {LAYOUTS}")
    limit = _bytes(max_shard_size)
    target = Path(folder)
    state = _state(model)
    with folders.replaced(target) as partial:
        if layout == "dcp":
            dcp.write(partial, {name: tensor.detach() for name, tensor in state.items()})
        else:
            _write_safetensors(model, state, partial, limit)
        if folders.rank() == 0:
            _write_configs(model, partial)


def _state(model: Any) -> dict[str, torch.Tensor]:
    """Return name -> tensor of all that is saved, each tied parameter once."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.is_meta:
            raise SaveError(f"{name!r} is on meta and has no value to save")
        names[id(tensor)].append(name)
    patterns = adapter.tied_patterns(model)
    for shared in names.values():
        if len(shared) == 1:
            continue
        declared = [name for name in sorted(shared) if any(re.search(pattern, name) for pattern in patterns)]
        # one name has to stay, even if all are declared as copies
        dropped = set(declared[: len(shared) - 1])
        if len(shared) - len(dropped) > 1:
            raise SaveError(f"{sorted(shared)} share memory, but the model does not declare them as tied")
        for name in dropped:
            del state[name]
    return state


def _groups(model: Any, state: dict[str, torch.Tensor]) -> tuple[list[SaveGroup], list[Any]]:
    """Return the conversion groups in the order of the file, and the renamings of their results."""
    renamings, converters = adapter.split_transforms(adapter.reversed_conversions(model))
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, SaveGroup] = {}
    for name in sorted(state, key=adapter.natural_order):
        key, pattern = adapter.reverse_renamed(name, renamings, converters)
        group = groups.setdefault(key, SaveGroup(name=key))
        if pattern is not None:
            group.transform = by_pattern[pattern]
        group.sources.append((pattern or name, name))
    for group in groups.values():
        sources = {
            name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta") for _, name in group.sources
        }
        made = group.convert(sources, model, renamings)
        group.outputs = {key: tensor.numel() * tensor.element_size() for key, tensor in made.items()}
    return list(groups.values()), renamings


def _files(groups: list[SaveGroup], limit: int) -> list[list[SaveGroup]]:
    """Pack groups into files in order; a group is never split."""
    files: list[list[SaveGroup]] = [[]]
    size = 0
    for group in groups:
        if files[-1] and size + group.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(group)
        size += group.nbytes
    return files


def _write_safetensors(model: Any, state: dict[str, torch.Tensor], folder: Path, limit: int) -> None:
    groups, renamings = _groups(model, state)
    files = _files(groups, limit)
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for group in content:
            weight_map |= dict.fromkeys(group.outputs, name)
            # a collective: all ranks gather in the same order, only the first one keeps the result
            full = {source: _full(state[source]) for _, source in group.sources}
            if folders.rank() == 0:
                made = group.convert(full, model, renamings)
                tensors |= {key: tensor.contiguous() for key, tensor in made.items()}
            del full
        if folders.rank() == 0:
            save_file(dict(_unshared(tensors)), folder / name, metadata={"format": "pt"})
    if len(files) > 1 and folders.rank() == 0:
        total = sum(group.nbytes for group in groups)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor on the CPU. Collective over the tensor's mesh."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        if tensor.to_local().device.type != tensor.device_mesh.device_type:
            tensor = tensor.to(tensor.device_mesh.device_type)  # offloaded: its mesh communicates elsewhere
        tensor = tensor.full_tensor()
    return tensor.cpu()


def _unshared(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors with a storage each; views of one tensor (a split) are no ties."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        alone = tensor.numel() == 0 or (whole and storage.data_ptr() not in seen)
        seen.add(storage.data_ptr())
        yield key, tensor if alone else tensor.clone()


def _write_configs(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [adapter.plain_class(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if match is None or isinstance(size, bool) or match[2] not in UNITS or float(match[1]) <= 0:
        raise SaveError(f"max_shard_size={size!r} must be a positive number of bytes such as 5_000_000 or '5GB'")
    return max(1, int(float(match[1]) * UNITS[match[2]]))
