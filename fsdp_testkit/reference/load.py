"""`load_sharded`: from a checkpoint folder to a sharded model, each rank reading its own slices."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fsdp_testkit.reference import adapter, dcp, routes, units
from fsdp_testkit.reference.build import Recorder
from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.grouping import Unit
from fsdp_testkit.reference.origin import Origin, told
from fsdp_testkit.reference.places import Places
from fsdp_testkit.reference.plan import Plan
from fsdp_testkit.reference.progress import Progress
from fsdp_testkit.reference.ranks import Ranks
from fsdp_testkit.reference.stream import Filler
from fsdp_testkit.reference.weights import WeightMap

#: what everybody calls the axis of context parallelism
CONTEXT = "cp"


def load_sharded(
    checkpoint: str | Path,
    mesh: Any,
    plan: Any = "auto",
    dtype: torch.dtype | None = None,
    *,
    model_class: Any = None,
    device: torch.device | str | None = None,
    source: str = "auto",
    source_scope: str = "replica",
    zero_copy: bool = True,
    progress: bool = True,
) -> Any:
    """Load a checkpoint folder as a model sharded by FSDP2, in ``eval`` mode as ``from_pretrained`` does.

    The model is built on meta, cut into units, and each rank then gets only the slices it owns; no rank ever
    holds the model, and no parameter is initialised at random. Non-persistent buffers get the values that the
    model's own constructor computes. Collective over the mesh: what goes wrong on one rank is raised on all.

    Args:
        checkpoint: folder with ``config.json`` and safetensors (one file, or several with an index), or a DCP
            folder with ``config.json`` beside ``.metadata``.
        mesh: device mesh of 1 axis (shard) or 2 axes (replicate, shard), named or not. Under context parallelism
            the axis that parameters are sharded over is the flattened one: ``mesh["dp", "cp"]._flatten("dp_cp")``.
        plan: what `Plan.parse` takes.
        dtype: floating point dtype of the parameters; the config's if ``None``. Modules that the model keeps
            in fp32 stay so.
        model_class: a transformers model class; the config's first architecture if ``None``.
        device: where parameters and buffers live; the mesh's device if ``None``. Parameters of units with
            ``cpu_offload`` live on the CPU.
        source: ``"slices"``: ranks read the slices they own. ``"rank0"``: one rank reads, converts and sends each
            other one its slices, tensor by tensor; the others need not see the folder. ``"auto"``: ``slices``
            where every rank sees the folder, else ``rank0``.
        source_scope: what a source is one of: ``"replica"``, ``"node"`` or ``"global"``; see `routes`. With the
            default every replica reads for itself; ``source="slices", source_scope="global"`` reads each byte
            once in all and sends it along the replicate axis.
        zero_copy: let parameters on the CPU that have the file's dtype and lie in it as they are be private views of
            the file's map, which take no memory until they are written to. The folder may be replaced afterwards
            (`save_sharded` does so); a program that overwrites its files in place changes or breaks such views.
        progress: show a bar on the mesh's first rank when the load takes longer than a second.

    Returns:
        The model; ``isinstance(model, FSDPModule)``.

    Raises:
        LoadError: the folder is unreadable, or its keys do not fit the model; all findings in one error.
        PlanError: the plan is malformed or does not fit the model.
    """
    mesh = _named(mesh)
    ranks = Ranks(mesh)
    folder = Path(checkpoint)
    with ranks.phase(votes=True) as vote:
        plan = Plan.parse(plan)
        routes.check(source, source_scope)
        target = _device(mesh, device)
        vote.highest = int(not (folder / "config.json").is_file())
    route = routes.choose(ranks, source, source_scope, visible=not vote.highest)
    with contextlib.nullcontext() if route.quiet else told(folder, ranks, route) as heard:
        with ranks.phase(votes=True) as vote:
            origin = heard or Origin.open(folder)
            vote.same = origin.digest
            drawn = _draw(origin, plan, dtype, model_class)
        # only when all ranks have come so far: sharding may make process groups, which waits for every rank
        with ranks.phase():
            made = _shard(drawn, mesh, target)
        bar = Progress(made.nbytes(), shown=progress and ranks.rank == int(mesh.mesh.flatten()[0]))
        try:
            _fill(made, origin, ranks, route, Filler(made.places, ranks, route, bar, zero_copy=zero_copy))
        finally:
            bar.close()
    return made.drawn.model


@dataclass(slots=True, kw_only=True)
class _Drawn:
    """A model on meta, and what is known of its tensors.

    Attributes:
        loaded: names of the tensors that the checkpoint gives.
        spare: the others, on meta, whose values `recorder` can compute.
        cut: the units that it is to be sharded by.
    """

    model: Any
    weights: WeightMap | None
    loaded: set[str]
    spare: dict[str, torch.Tensor]
    recorder: Recorder
    cut: list[Unit]


@dataclass(slots=True)
class _Made:
    """A drawn model that is sharded, and the memory it is going to have."""

    drawn: _Drawn
    places: Places

    def nbytes(self) -> int:
        """Return the bytes that this rank is going to hold of the checkpoint."""
        return sum(self.places.nbytes(name) for name in self.drawn.loaded)


def _draw(origin: Origin, plan: Plan, dtype: Any, model_class: Any) -> _Drawn:
    """Build the model on meta and compare it with the checkpoint; no memory is taken, no other rank waited for."""
    config, model_class = _config(origin.small, origin.folder, model_class)
    dtype = _dtype(config, dtype)
    recorder = Recorder()
    with recorder.recording():
        model = adapter.construct(model_class, config, dtype)
    _keep_fp32(model, dtype)
    weights, loaded, problems = origin.fit(model)
    if problems:
        raise LoadError(f"{origin.folder} does not fit {model_class.__name__}:", problems)
    _drop_memory(model, loaded)
    cut = units.resolve(plan, model)
    spare = _record_inits(model, recorder, loaded)
    return _Drawn(model=model, weights=weights, loaded=loaded, spare=spare, recorder=recorder, cut=cut)


def _shard(drawn: _Drawn, mesh: Any, device: torch.device) -> _Made:
    """Shard the model on meta. Every rank of the mesh has to call it."""
    adapter.forget_meshes()
    units.apply(drawn.cut, drawn.model, mesh)
    return _Made(drawn, Places(drawn.model, drawn.cut, mesh, device))


def _fill(made: _Made, origin: Origin, ranks: Ranks, route: routes.Route, filler: Filler) -> None:
    """Give the model its memory and values."""
    drawn = made.drawn
    items = origin.items(drawn.weights, drawn.model, made.places, route)
    # torch's reader takes a DCP folder's tensors all at once, each rank its own slices
    at_once = origin.saved if isinstance(origin.saved, dcp.DcpCheckpoint) and not route.whole else None
    if not route.quiet:
        with ranks.phase():
            if at_once is not None and route.reads:
                at_once.read(made.places.allocate(drawn.loaded))
        filler.fill(items)
    with ranks.phase():
        if route.quiet and at_once is not None:
            at_once.read(made.places.allocate(drawn.loaded))
        elif route.quiet:
            filler.fill(items)
        made.places.fill_spare(drawn.spare, drawn.recorder)
        made.places.install()
        _finish(drawn.model, origin.small, drawn.weights)


def _named(mesh: Any) -> Any:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
        raise LoadError(f"mesh={mesh!r} must be a DeviceMesh of 1 axis (shard) or 2 axes (replicate, shard)")
    if mesh.ndim == 2 and CONTEXT in (mesh.mesh_dim_names or ()):
        raise LoadError(
            f"mesh={mesh!r} has an axis of context parallelism, over which parameters would not be sharded; "
            f"flatten it: mesh[{', '.join(map(repr, mesh.mesh_dim_names))}]._flatten()"
        )
    if mesh.get_coordinate() is None:
        raise LoadError(f"this rank is not part of mesh {mesh}")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        # fully_shard wants names on two axes
        return DeviceMesh(mesh.device_type, mesh.mesh, mesh_dim_names=("replicate", "shard"))
    return mesh


def _device(mesh: Any, device: torch.device | str | None) -> torch.device:
    target = torch.device(mesh.device_type if device is None else device)
    if target.type not in (mesh.device_type, "cpu"):
        raise LoadError(f"device={str(target)!r} must be of the mesh's type {mesh.device_type!r}")
    if target.type != "cpu" and target.index is None:
        target = torch.device(target.type, torch.get_device_module(target.type).current_device())
    return target


def _config(small: Path, folder: Path, model_class: Any) -> tuple[Any, Any]:
    """Return (config, model class); ``small`` is where the file is, ``folder`` what it is called."""
    reader = transformers.AutoConfig if model_class is None else model_class.config_class
    try:
        config = copy.deepcopy(_parsed(reader, small, (small / "config.json").read_bytes()))
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


@functools.lru_cache(maxsize=4)
def _parsed(reader: Any, folder: Path, content: bytes) -> Any:
    """Return the config in ``folder``, whose file holds ``content``. Do not change it.

    To read one takes a twelfth of the time that it takes to build a small model on meta: an actor and its reference, or
    the same weights loaded again and again, need it once.
    """
    del content  # a changed file is another config
    return reader.from_pretrained(folder, local_files_only=True)


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


def _drop_memory(model: Any, loaded: set[str]) -> None:
    """Put the parameters that the checkpoint gives on meta, ties kept.

    Some constructors call ``torch.FloatTensor(...)``, which takes memory whatever the device of the context is.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    fresh = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for name, parameter in named
        if name in loaded and not parameter.is_meta
    }
    for name, parameter in named:
        if id(parameter) in fresh:
            module, _, own = name.rpartition(".")
            model.get_submodule(module)._parameters[own] = fresh[id(parameter)]


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
