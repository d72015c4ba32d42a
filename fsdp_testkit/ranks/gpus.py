"""Which GPUs there are, told without torch: the process that hands them out must not wake the driver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")
VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible(env: Mapping[str, str] = os.environ, driver: Path = _DRIVER) -> tuple[str, ...]:
    """Return the GPUs that a process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Args:
        env: environment; the variable is obeyed, with numbers, UUIDs or MIG names, up to the first that is not valid,
            as CUDA does: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables.
        driver: where NVIDIA's driver lists GPUs, one folder for each.
    """
    if VARIABLE not in env:
        try:
            return tuple(str(index) for index, _ in enumerate(driver.iterdir()))
        except OSError:
            return ()
    names = []
    for name in env[VARIABLE].split(","):
        if not (text := name.strip()) or text.startswith("-") or text in names:
            break
        names.append(text)
    return tuple(names)


def device_index(local_rank: int, count: int) -> int:
    """Return the index of the GPU of a rank, among the ``count`` that it sees.

    Raises:
        RuntimeError: there is none.
    """
    if count < 1:
        raise RuntimeError("device='cuda' was asked for, and this rank sees no GPU")
    return local_rank % count
