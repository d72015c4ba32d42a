"""Weights that Accelerate's hooks keep on the CPU or on disk, while the model holds meta tensors.

Read through the hooks' attributes, without importing accelerate. Seen in accelerate 1.14 and transformers 5.23;
`tests/reference/test_offloaded.py` notices when they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fsdp_testkit.reference.errors import SaveError


def fetcher(model: torch.nn.Module, name: str) -> Callable[[], torch.Tensor]:
    """Return a function that reads the value of the meta tensor ``name`` to the CPU, each time anew.

    Raises:
        SaveError: no hook has it.
    """
    weights, key = _place(model, name)

    def fetch() -> torch.Tensor:
        value: torch.Tensor = weights[key]
        return value.detach()

    return fetch


def moved(model: torch.nn.Module, folder: Path, places: Mapping[str, tuple[str, str]]) -> None:
    """Let the hooks read from the new files what they read from the old files of ``folder``, which are gone.

    Args:
        model: the model that was saved.
        folder: where it was saved.
        places: name in the model -> (file name, key), for tensors that are stored as they are.
    """
    for name, (file, key) in places.items():
        entry = _index_entry(*_place(model, name))
        old = None if entry is None else entry.get("safetensors_file")
        if entry is not None and old is not None and Path(old).resolve().parent == folder.resolve():
            entry |= {"safetensors_file": str(folder / file), "weight_name": key}


def _place(model: torch.nn.Module, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Return (map, key) of an offloaded tensor, from the innermost hook that has it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        key = ".".join(parts[depth:])
        for hook in _hooks(model.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None and _has(weights, key):
                return weights, key
    raise SaveError(f"{name!r} is on meta, and no offloading hook has its value")


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))  # a sequence of hooks, or one


def _has(weights: Any, key: str) -> bool:
    dataset, prefix = getattr(weights, "dataset", None), getattr(weights, "prefix", "")
    # a prefixed map's own __contains__ would read the tensor
    return f"{prefix}{key}" in list(dataset) if dataset is not None else key in list(weights)


def _index_entry(weights: Any, key: str) -> dict[str, Any] | None:
    """Return the entry of a tensor that is read from a file, ``None`` if it is in memory."""
    while (dataset := getattr(weights, "dataset", None)) is not None:
        weights, key = dataset, f"{weights.prefix}{key}"
    if key in getattr(weights, "state_dict", ()):
        return None
    entry: dict[str, Any] | None = getattr(weights, "index", {}).get(key)
    return entry
