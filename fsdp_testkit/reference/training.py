"""`save_training` and `load_training`: optimizer, scheduler and RNG, without a pickle.

Tensors go through torch.distributed.checkpoint under flat names ``state.<parameter>.<key>``, so that they can be
read on any mesh; everything else is JSON. The optimizer is read and written through its own ``state`` and
``param_groups``: torch's state-dict helpers would make state for parameters that never had a gradient.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import dcp, disk, folders, plainjson
from fsdp_testkit.reference.errors import LoadError, TrainingStateError
from fsdp_testkit.reference.sources import Source

FORMAT = 1
STATE = folders.TRAINING_STATE
logger = logging.getLogger(__name__)


def save_training(model: Any, optimizer: Any, scheduler: Any, folder: str | Path, *, durable: bool = True) -> None:
    """Save what is needed, beside the weights, to resume training. Every rank must call this.

    `save_sharded` does the same in one step with the weights, so that they cannot come apart.

    Args:
        model: the model whose parameters the optimizer holds.
        optimizer: any `torch.optim.Optimizer` whose state is tensors and plain values.
        scheduler: an object with ``state_dict`` of plain values, or ``None``.
        folder: written is ``folder / "training"``; an older one is replaced as a whole.
        durable: return when everything is on the disk, see `save_sharded`.

    Raises:
        TrainingStateError: the optimizer holds a parameter that is not the model's, or a state that is
            neither tensor nor plain value. All ranks raise.
    """
    target = Path(folder) / folders.TRAINING
    with folders.replaced(target, keep=lambda _: False, durable=durable) as partial:
        write(model, optimizer, scheduler, partial, durable=durable)


def write(model: Any, optimizer: Any, scheduler: Any, folder: Path, *, durable: bool) -> None:
    """Write the files of `save_training` into ``folder``, which is made if missing. Collective."""
    problem: Exception | None = None
    content: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    try:
        content = _content(model, optimizer, scheduler, tensors)
        folder.mkdir(exist_ok=True)
        disk.write_text(folder / _rng_file(folders.rank()), json.dumps(_rng()), durable=durable)
    except Exception as error:
        problem = error
    folders.agree(problem, TrainingStateError)
    if tensors:
        dcp.write(folder, {name: Source(tensor) for name, tensor in tensors.items()}, durable=durable)
    if folders.rank() == 0:
        disk.write_text(folder / STATE, json.dumps(content, indent=1), durable=durable)
        if durable:
            disk.sync(folder)


def _content(model: Any, optimizer: Any, scheduler: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what is plain, and fill in ``tensors``."""
    names = _names(model, optimizer)
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        values[name] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"state.{name}.{key}"] = value.detach()
                values[name][key] = {"shape": list(value.shape), "dtype": str(value.dtype)}
            else:
                values[name][key] = {"value": plainjson.encode(value)}
    return {
        "format": FORMAT,
        "world": folders.world(),
        "optimizer": type(optimizer).__name__,
        "state": values,
        "groups": [_group(group, names) for group in optimizer.param_groups],
        "scheduler": None if scheduler is None else plainjson.encode(scheduler.state_dict()),
        "scheduler_type": None if scheduler is None else type(scheduler).__name__,
    }


def load_training(model: Any, optimizer: Any, scheduler: Any, folder: str | Path, *, rng: str = "auto") -> None:
    """Restore in place what `save_training` wrote, on the same or another mesh. Every rank must call this.

    Args:
        model: the model; the same parameter names as when saved.
        optimizer: of the same class, over the same parameters in the same groups.
        scheduler: of the same class, or ``None`` if none was saved.
        folder: the folder given to `save_training`.
        rng: ``"auto"`` restores each rank's generators if the number of ranks is the same, and logs a warning
            otherwise; ``"require"`` fails otherwise; ``"skip"`` leaves them.

    Raises:
        TrainingStateError: a file is missing or damaged, or anything saved has no place in what was given, or
            the other way round. All ranks raise, and nothing has been changed on any.
    """
    source = Path(folder) / folders.TRAINING
    problem: Exception | None = None
    found: _Found | None = None
    before: Any = None
    try:
        if rng not in ("auto", "require", "skip"):
            raise TrainingStateError(f"rng={rng!r} must be 'auto', 'require' or 'skip'")
        before = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        found = _find(source, model, optimizer, scheduler, rng)
        if scheduler is not None:  # code of its own, which may refuse
            scheduler.load_state_dict(found.scheduler)
    except TrainingStateError as error:
        problem = error
    except Exception as error:
        problem = TrainingStateError(f"{source} cannot be restored: {type(error).__name__}: {error}")
    try:
        folders.agree(problem, TrainingStateError)
    except BaseException:
        if before is not None:
            scheduler.load_state_dict(before)
        raise
    assert found is not None
    optimizer.state.clear()
    optimizer.state.update(found.states)
    for group, options in zip(optimizer.param_groups, found.options, strict=True):
        group.update(options)
    if found.generators is not None:
        found.generators.restore()
    elif rng == "auto":
        logger.warning("generators not restored: saved on %s ranks, now %s", found.world, folders.world())


@dataclass(slots=True, kw_only=True)
class _Found:
    """What a folder holds, ready to be put in place."""

    world: int
    states: dict[torch.Tensor, dict[str, Any]]
    options: list[dict[str, Any]]
    scheduler: Any
    generators: _Generators | None


def _find(source: Path, model: Any, optimizer: Any, scheduler: Any, rng: str) -> _Found:
    """Read and compare everything; change nothing. No collective is called."""
    content = _json(source / STATE)
    if content.get("format") != FORMAT:
        raise TrainingStateError(f"{source / STATE} has format {content.get('format')!r}, expected {FORMAT}")
    names = _names(model, optimizer)
    with _damage_of(source / STATE):
        problems = _compare(content, optimizer, scheduler, names)
        world = content["world"]
    if problems:
        raise TrainingStateError("\n  - ".join(["the saved training state does not fit:", *problems]))
    same_world = world == folders.world()
    if rng == "require" and not same_world:
        raise TrainingStateError(
            f"saved on {world} ranks, resumed on {folders.world()}: the generators of every rank "
            "cannot be restored; pass rng='skip' to go on with the present ones"
        )
    generators = None
    if rng != "skip" and same_world:
        file = source / _rng_file(folders.rank())
        with _damage_of(file):
            generators = _Generators.of(_json(file))
    with _damage_of(source / STATE):
        options = [{key: plainjson.decode(value) for key, value in g["options"].items()} for g in content["groups"]]
        state_of_scheduler = None if scheduler is None else plainjson.decode(content["scheduler"])
    return _Found(
        world=world,
        options=options,
        scheduler=state_of_scheduler,
        generators=generators,
        states=_read_state(source, content["state"], optimizer, names),
    )


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Name the file whose content is not what `write` makes: it may fail anywhere."""
    try:
        yield
    except LookupError as error:
        raise TrainingStateError(f"{file} is damaged: it lacks {error}") from error
    except Exception as error:
        raise TrainingStateError(f"{file} is damaged: {error}") from error


def _names(model: Any, optimizer: Any) -> dict[int, str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise TrainingStateError(
                    f"parameter {index} of optimizer group {number}, shape {tuple(parameter.shape)}, is not the "
                    "model's: make the optimizer after sharding, from model.parameters()"
                )
    return names


def _group(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    return {
        "params": [names[id(parameter)] for parameter in group["params"]],
        "options": {key: plainjson.encode(value) for key, value in group.items() if key != "params"},
    }


def _compare(content: dict[str, Any], optimizer: Any, scheduler: Any, names: dict[int, str]) -> list[str]:
    """Return everything that does not fit."""
    problems: list[str] = []
    if content["optimizer"] != type(optimizer).__name__:
        problems.append(f"optimizer: {content['optimizer']} was saved, {type(optimizer).__name__} is given")
    given = None if scheduler is None else type(scheduler).__name__
    if content["scheduler_type"] != given:
        problems.append(f"scheduler: {content['scheduler_type']} was saved, {given} is given")
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in content["groups"]]
    if len(groups) != len(saved):
        problems.append(f"optimizer: {len(saved)} parameter groups were saved, {len(groups)} are given")
    else:
        for number, (old, new) in enumerate(zip(saved, groups, strict=True)):
            if lost := sorted(set(old) - set(new)):
                problems.append(f"group {number}: saved parameters {lost} are not in it")
            if extra := sorted(set(new) - set(old)):
                problems.append(f"group {number}: parameters {extra} were not in it when saved")
    grouped = {name for group in saved for name in group}
    if stray := sorted(set(content["state"]) - grouped):
        problems.append(f"optimizer: saved state of {stray} belongs to no group")
    return problems


def _read_state(
    source: Path, saved: dict[str, Any], optimizer: Any, names: dict[int, str]
) -> dict[torch.Tensor, dict[str, Any]]:
    """Return parameter -> state, tensors sharded as the parameter is where they have its shape."""
    states: dict[torch.Tensor, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name not in saved:
                continue  # it had no state when saved: no gradient had reached it
            states[parameter] = {}
            for key, entry in saved[name].items():
                if "value" in entry:
                    states[parameter][key] = plainjson.decode(entry["value"])
                    continue
                tensor = _like(parameter, tuple(entry["shape"]), plainjson.dtype(entry["dtype"]), group)
                states[parameter][key] = tensors[f"state.{name}.{key}"] = tensor
    if tensors:
        try:
            saved_tensors = dcp.DcpCheckpoint(source)
            if lost := sorted(set(tensors) - saved_tensors.names):
                raise TrainingStateError(f"{source} lacks {lost[:5]}")
            saved_tensors.read(tensors)
        except LoadError as error:
            raise TrainingStateError(str(error)) from error
    return states


def _like(parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> torch.Tensor:
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    # a step counter: on the CPU, unless the optimizer's kernels read it on the device
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    on_device = group.get("capturable") or group.get("fused")
    return torch.zeros(shape, dtype=dtype, device=local.device if on_device else "cpu")


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.json"


def _rng() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    return {
        "python": plainjson.encode(random.getstate()),
        "numpy": plainjson.encode(tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in numpy_state)),
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


@dataclass(slots=True, kw_only=True)
class _Generators:
    """States of this process's generators, each tried on a generator of its own."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> _Generators:
        """Decode what `_rng` made; any exception where it is something else."""
        cuda = None if saved["cuda"] is None else _bytes(saved["cuda"])
        if (cuda is not None) != torch.cuda.is_available():
            raise TrainingStateError("it was saved with and is restored without CUDA, or the reverse")
        made = cls(
            python=plainjson.decode(saved["python"]),
            numpy=plainjson.decode(saved["numpy"]),
            torch=_bytes(saved["torch"]),
            cuda=cuda,
        )
        random.Random().setstate(made.python)
        np.random.RandomState().set_state(made.numpy)
        torch.Generator().set_state(made.torch)
        if made.cuda is not None:
            torch.Generator("cuda").set_state(made.cuda)
        return made

    def restore(self) -> None:
        """Put them in place."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingStateError(f"{path} is missing or damaged: {error}") from None
    if not isinstance(content, dict):
        raise TrainingStateError(f"{path} does not hold a training state")
    return content
