"""Plain Python values as JSON and back, exactly: tuples, dicts with any plain keys, small tensors, dtypes."""

from __future__ import annotations

from typing import Any

import torch

from fsdp_testkit.reference.errors import TrainingStateError

TAG = "__kind__"


def encode(value: Any) -> Any:
    """Return JSON data for ``value``.

    Raises:
        TrainingStateError: ``value`` is, or holds, something that is not plain.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        # bool, int, float and str subclasses would come back as their bases
        if type(value) in (type(None), bool, int, float, str):
            return value
    elif isinstance(value, torch.Tensor):
        return {TAG: "tensor", "dtype": str(value.dtype), "value": encode(value.detach().cpu().tolist())}
    elif isinstance(value, torch.dtype):
        return {TAG: "dtype", "value": str(value)}
    elif type(value) is list:
        return [encode(item) for item in value]
    elif type(value) is tuple:
        return {TAG: "tuple", "value": [encode(item) for item in value]}
    elif isinstance(value, dict):  # Counter and OrderedDict come back as dict, which is what their owners update from
        return {TAG: "dict", "value": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TrainingStateError(f"{type(value).__name__} {value!r} is not a plain value and cannot be saved")


def decode(data: Any) -> Any:
    """Return the value that `encode` was given.

    Raises:
        TrainingStateError: ``data`` is not of `encode`'s making.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    kind, value = data.get(TAG), data.get("value")
    if kind == "tensor":
        return torch.tensor(decode(value), dtype=dtype(data["dtype"]))
    if kind == "dtype":
        return dtype(value)
    if kind == "tuple" and isinstance(value, list):
        return tuple(decode(item) for item in value)
    if kind == "dict" and isinstance(value, list):
        return {decode(key): decode(item) for key, item in value}
    raise TrainingStateError(f"{data!r} is not a saved value")


def dtype(text: Any) -> torch.dtype:
    """Return the dtype that ``str`` turned into ``text``.

    Raises:
        TrainingStateError: ``text`` names no dtype.
    """
    found = getattr(torch, str(text).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise TrainingStateError(f"{text!r} names no dtype")
    return found
