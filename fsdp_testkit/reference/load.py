"""`load_sharded`: from a checkpoint folder to a sharded model, each rank reading its own slices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fsdp_testkit.reference import adapter, dcp, units
from fsdp_testkit.reference.build import Recorder
from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.files import Checkpoint
from fsdp_testkit.reference.places import Places
from fsdp_testkit.reference.plan import Plan
from fsdp_testkit.reference.weights import GroupReader, WeightMap, match

SOURCES = ("slices",)


def load_sharded(
    checkpoint: str | Path,
    mesh: Any,
    plan: Any = "auto",
    dtype: torch.dtype | None = None,
    *,
    model_class: Any = None,
    device: torch.device | str | None = None,
    source: str = "slices",
) -> Any:
    """Load a checkpoint folder as a model sharded by FSDP2, in ``eval`` mode as ``from_pretrained`` does.

    The model is built on meta, cut into units, and each rank then reads only the slices it owns; no rank ever
    holds the model, and no parameter is initialised at random. Non-persistent buffers get the values that the
    model's own constructor computes. No collective is called.

    Args:
        checkpoint: folder with ``config.json`` and safetensors (one file, or several with an index), or a DCP
            folder with ``config.json`` beside ``.metadata``.
        mesh: device mesh of 1 axis (shard) or 2 axes (replicate, shard), named or not.
        plan: what `Plan.parse` takes.
        dtype: floating point dtype of the parameters; the config's if ``None``. Modules that the model keeps
            in fp32 stay so.
        model_class: a transformers model class; the config's first architecture if ``None``.
        device: where parameters and buffers live; the mesh's device if ``None``. Parameters of units with
            ``cpu_offload`` live on the CPU.
        source: ``"slices"``: every rank reads its own slices.

    Returns:
        The model; ``isinstance(model, FSDPModule)``.

    Raises:
        LoadError: the folder is unreadable, or its keys do not fit the model; all findings in one error.
        PlanError: the plan is malformed or does not fit the model.
        ValueError: another argument is not one of those described.
    """
    plan = Plan.parse(plan)
    if source not in SOURCES:
        raise LoadError(f"source={source!r} must be one of {SOURCES}")
    mesh = _named(mesh)
    folder = _folder(checkpoint)
    target = _device(mesh, device)
    config, model_class = _config(folder, model_class)
    dtype = _dtype(config, dtype)
    saved: Checkpoint | dcp.DcpCheckpoint = dcp.DcpCheckpoint(folder) if dcp.is_dcp(folder) else Checkpoint(folder)
    recorder = Recorder()
    with recorder.recording():
        model = adapter.construct(model_class, config, dtype)
    _keep_fp32(model, dtype)
    if isinstance(saved, dcp.DcpCheckpoint):
        weights, problems = None, saved.compare(model)
        loaded = set(saved.names)
    else:
        weights = match(saved, model)
        problems = weights.problems
        loaded = {name for group in weights.groups for name in group.targets}
    if problems:
        raise LoadError(f"{folder} does not fit {model_class.__name__}:", problems)
    cut = units.resolve(plan, model)
    spare = _record_inits(model, recorder, loaded)
    adapter.forget_meshes()
    units.apply(cut, model, mesh)
    places = Places(model, cut, mesh, target)
    if weights is None:
        saved.read(places.allocate(loaded))  # type: ignore[union-attr]  # the DCP branch
    else:
        _read_groups(weights, saved, model, places)
    places.fill_spare(spare, recorder)
    places.install()
    _finish(model, folder, weights)
    return model


def _named(mesh: Any) -> Any:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
        raise LoadError(f"mesh={mesh!r} must be a DeviceMesh of 1 axis (shard) or 2 axes (replicate, shard)")
    if mesh.get_coordinate() is None:
        raise LoadError(f"this rank is not part of mesh {mesh}")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        # fully_shard wants names on two axes
        return DeviceMesh(mesh.device_type, mesh.mesh, mesh_dim_names=("replicate", "shard"))
    return mesh


def _folder(checkpoint: str | Path) -> Path:
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise LoadError(f"checkpoint={str(folder)!r} is not a folder")
    if not any(folder.iterdir()):
        raise LoadError(f"checkpoint={str(folder)!r} is an empty folder")
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json")
    return folder


def _device(mesh: Any, device: torch.device | str | None) -> torch.device:
    target = torch.device(mesh.device_type if device is None else device)
    if target.type not in (mesh.device_type, "cpu"):
        raise LoadError(f"device={str(target)!r} must be of the mesh's type {mesh.device_type!r}")
    if target.type != "cpu" and target.index is None:
        target = torch.device(target.type, torch.get_device_module(target.type).current_device())
    return target


def _config(folder: Path, model_class: Any) -> tuple[Any, Any]:
    """Return (config, model class)."""
    reader = transformers.AutoConfig if model_class is None else model_class.config_class
    try:
        config = reader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad config.json
        raise LoadError(f"{folder / 'config.json'} cannot be read: {type(error).__name__}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise LoadError(f"{folder} is quantized, which is not supported")
    if model_class is None:
        name = (config.architectures or [None])[0]
        model_class = getattr(transformers, name, None) if name else None
        if model_class is None:
            raise LoadError(f"{folder / 'config.json'}: architectures={config.architectures} is no known model class")
    config.name_or_path = str(folder)
    return config, model_class


def _dtype(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    chosen = config.dtype if dtype is None else dtype
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, chosen)
    if chosen is None:
        chosen = torch.get_default_dtype()
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise LoadError(f"dtype={chosen!r} must be a floating point torch.dtype")
    return chosen


def _keep_fp32(model: Any, dtype: torch.dtype) -> None:
    """Give the tensors that the model keeps in fp32 that dtype, ties kept."""
    pattern = adapter.fp32_pattern(model, dtype)
    if pattern is None:
        return
    changed: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                full = f"{prefix}.{name}" if prefix else name
                if tensor is None or not tensor.is_floating_point() or not pattern.search(full):
                    continue
                if held is module._parameters:
                    if id(tensor) not in changed:
                        changed[id(tensor)] = nn.Parameter(tensor.float(), requires_grad=tensor.requires_grad)
                    held[name] = changed[id(tensor)]
                elif name not in module._non_persistent_buffers_set:
                    held[name] = tensor.float()


def _record_inits(model: Any, recorder: Recorder, loaded: set[str]) -> dict[str, torch.Tensor]:
    """Record the model's initialisation of all that no file gives; return those tensors, on meta, by name.

    These are the non-persistent buffers, and keys that the model allows to be missing.
    """
    given: set[int] = set()
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in loaded:
        given.add(id(tensors[name]))
        adapter.mark_initialized(tensors[name])
    with recorder.recording(), torch.no_grad():
        model.initialize_weights()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items() if id(tensor) not in given}


def _read_groups(weights: WeightMap, saved: Any, model: Any, places: Places) -> None:
    filled: dict[int, str] = {}
    for group in weights.groups:
        reader = GroupReader(group, saved, model)
        for name in group.targets:
            out, start = places.window(name)
            key = id(places.tensors[name])
            if key in filled:
                # both names of a tied parameter are in the file: right only if they agree
                again = torch.empty_like(out)
                reader.read_into(again, name, start)
                if not torch.equal(again, out):
                    raise LoadError(
                        f"{name!r} and {filled[key]!r} are tied, but the file holds different values for them"
                    )
                continue
            reader.read_into(out, name, start)
            filled[key] = name


def _finish(model: Any, folder: Path, weights: WeightMap | None) -> None:
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise AssertionError(f"left on meta: {left}")
    if weights is not None:
        # saving reverts exactly what loading applied
        model._weight_conversions = copy.deepcopy(weights.used)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.eval()


__all__ = ["load_sharded"]
