"""Environment switches that other loaders read: set for a while, restored always, and seen to be effective."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.errors import SwitchError

#: what accelerate sets and transformers reads, for one rank to load the weights and the others to wait for them:
#: https://huggingface.co/docs/accelerate/usage_guides/fsdp
EFFICIENT_LOADING: Mapping[str, str] = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@contextmanager
def switched(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for the length of a block; afterwards each is what it was, or absent again.

    Args:
        values: name -> value; ``None`` removes the variable.

    Raises:
        SwitchError: a name or value is not usable; nothing has been set then.
    """
    for name, value in values.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise SwitchError(f"environment variable {name!r} must be a name without '=' and NUL")
        if value is not None and (not isinstance(value, str) or "\0" in value):
            raise SwitchError(f"{name}={value!r} must be a string without NUL, or None")
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


@contextmanager
def efficient_loading(*, check: bool = True) -> Iterator[None]:
    """Tell ``from_pretrained`` that each node's first rank loads the weights and the others wait for them.

    What that saves is transformers' choice: 5.23 skips the initialisation of missing keys on the other ranks, and
    copies all weights on all of them where it casts or converts (``docs/findings.md``, cause 17).

    Args:
        check: ask the reader of the switches whether they are effective.

    Raises:
        SwitchError: the switches are set and without effect: there is no process group yet, or they are read
            in another way than they were.
    """
    with switched(EFFICIENT_LOADING):
        if check and not adapter.waits_for_rank0():
            reason = "no process group is initialised" if not dist.is_initialized() else "transformers ignores them"
            raise SwitchError(f"{', '.join(EFFICIENT_LOADING)} are set and have no effect: {reason}")
        yield


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
