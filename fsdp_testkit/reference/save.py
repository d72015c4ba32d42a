"""`save_sharded`: standard safetensors, or a DCP folder, from a sharded or offloaded model."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.reference import adapter, dcp, disk, folders, offloaded, training
from fsdp_testkit.reference.errors import SaveError
from fsdp_testkit.reference.files import INDEX
from fsdp_testkit.reference.outputs import OutputFile, groups_of, pack
from fsdp_testkit.reference.sources import Source
from fsdp_testkit.reference.writer import write

LAYOUTS = ("safetensors", "dcp")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def save_sharded(
    model: Any,
    folder: str | Path,
    *,
    layout: str = "safetensors",
    max_shard_size: int | str = "5GB",
    durable: bool = True,
    optimizer: Any = None,
    scheduler: Any = None,
) -> None:
    """Save a sharded, plain or offloaded transformers model; every rank must call this.

    ``safetensors``: what a single-process ``save_pretrained`` of the same model would hold: the same keys,
    dtypes and values, converted back to the checkpoint's own format, tied keys once. Plain ``from_pretrained``
    reads it. All ranks write at the same time, and none holds more than its shard and what one conversion
    takes. ``dcp``: `torch.distributed.checkpoint` files, with the model's own names; `load_sharded` reads them
    on any mesh. Both come with ``config.json`` and the generation config.

    The folder is written beside and takes the target's name at the end, so that a failure at any moment leaves
    an older checkpoint whole, training state included. Files in an older folder that are no part of a
    checkpoint (a tokenizer, say) are kept; an older training state is not.

    A model may be saved over the folder that it was loaded from, even if it still reads from there.

    Args:
        model: a ``PreTrainedModel``; its parameters `DTensor`s, plain tensors (rank 0's are saved), or offloaded
            by Accelerate's hooks to CPU or disk.
        folder: target folder; made if missing.
        layout: ``"safetensors"`` or ``"dcp"``.
        max_shard_size: bytes, or text such as ``"5GB"``: a file is closed before it grows beyond. What one
            conversion makes stays in one file, whatever its size.
        durable: return when everything is on the disk, so that not even a power cut loses it. Without, the
            operating system writes when it likes: much sooner back, and still safe from a killed process.
        optimizer: saved with the model in one step, see `save_training`.
        scheduler: the same; needs ``optimizer``.

    Raises:
        SaveError: an argument is not one of these, parameters are shared that the model does not declare as
            tied, a tensor has no value, or the folder is a file or cannot be written. All ranks raise.
        TrainingStateError: see `save_training`.
    """
    if layout not in LAYOUTS:
        raise SaveError(f"layout={layout!r} must be one of {LAYOUTS}")
    if scheduler is not None and optimizer is None:
        raise SaveError(f"scheduler={scheduler!r} is given without an optimizer")
    limit = _bytes(max_shard_size)
    target = Path(folder)
    with folders.replaced(target, durable=durable) as partial:
        sources, files = folders.agreed(_planned, model, layout, limit)
        if layout == "dcp":
            dcp.write(partial, sources, durable=durable)
        else:
            write(files, sources, model, partial, durable=durable)
        folders.agreed(_write_rest, files, model, partial, durable)
        if optimizer is not None:
            training.write(model, optimizer, scheduler, partial / folders.TRAINING, durable=durable)
    places = {
        group.sources[0][1]: (file.name, group.name)
        for file in files
        for group in file.groups
        if group.transform is None and sources[group.sources[0][1]].fetch is not None
    }
    offloaded.moved(model, target, places)


def _planned(model: Any, layout: str, limit: int) -> tuple[dict[str, Source], list[OutputFile]]:
    """Return what is saved, and the files it goes to if they are safetensors."""
    sources = _sources(model)
    if layout == "dcp":
        return sources, []
    return sources, pack(groups_of(model, {name: source.tensor for name, source in sources.items()}), limit)


def _write_rest(files: list[OutputFile], model: Any, folder: Path, durable: bool) -> None:
    """Write the small files that rank 0 writes alone."""
    if folders.rank() == 0:
        if len(files) > 1:
            _write_index(files, model, folder, durable=durable)
        _write_configs(model, folder, durable=durable)


def _sources(model: Any) -> dict[str, Source]:
    """Return name -> source of all that is saved, each tied parameter once."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise SaveError(f"{name!r} is a {type(tensor).__name__}, and only tensors are saved")
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
    for name, kept in adapter.tied_names(model).items():
        # offloading may have made two meta tensors of one parameter
        if name in state and kept in state and state[name].is_meta and state[kept].is_meta:
            del state[name]
    return {
        name: Source(tensor, offloaded.fetcher(model, name) if tensor.is_meta else None)
        for name, tensor in state.items()
    }


def _write_index(files: list[OutputFile], model: Any, folder: Path, *, durable: bool) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "total_size": sum(group.nbytes for file in files for group in file.groups),
        },
        "weight_map": {key: file.name for file in files for key in file.frame.starts},
    }
    disk.write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n", durable=durable)


def _write_configs(model: Any, folder: Path, *, durable: bool) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [adapter.plain_class(model).__name__]
    before = set(folder.iterdir())
    adapter.write_code(model, config, folder)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for written in set(folder.iterdir()) - before if durable else ():
        disk.sync(written)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if match is None or isinstance(size, bool) or match[2] not in UNITS or float(match[1]) <= 0:
        raise SaveError(f"max_shard_size={size!r} must be a positive number of bytes such as 5_000_000 or '5GB'")
    return max(1, int(float(match[1]) * UNITS[match[2]]))
