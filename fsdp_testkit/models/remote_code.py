"""Classes from the code of a folder, as transformers' ``trust_remote_code`` finds them. For ranks, not for the parent.

transformers copies the ``.py`` files into its cache of modules and imports them from there. That cache is the
session's: `environment` says so to the processes, since transformers reads it when it is imported.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models.own_code import CONSENT

_CACHE = "HF_MODULES_CACHE"


def model_class(folder: str) -> Any:
    """Return the causal-LM class that a folder's ``auto_map`` names; its ``config_class`` is the config's.

    The same class in every call of a process, and in the processes forked from it.

    Raises:
        UsageError: this process was not told that its user agreed.
    """
    if os.environ.get(CONSENT) != "1" or not os.environ.get(_CACHE):
        raise UsageError(f"code={folder!r} is the code of a folder, which nobody agreed to run in this process")
    modules = os.environ[_CACHE]
    if modules not in sys.path:  # a forked rank has another path than the process that imported the code
        sys.path.append(modules)
    return _loaded(folder, modules)


@cache
def _loaded(folder: str, modules: str) -> Any:
    with _alone(Path(modules)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))


@contextmanager
def _alone(modules: Path) -> Iterator[None]:
    """Keep other ranks out: transformers copies a file in place, and another process could import half of it."""
    modules.mkdir(parents=True, exist_ok=True)
    with (modules / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file
        yield
