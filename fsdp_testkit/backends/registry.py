"""From a backend's name to an instance."""

from __future__ import annotations

import importlib

from fsdp_testkit.backends.base import CAPABILITIES, PROMISES, Backend
from fsdp_testkit.core.errors import UsageError

#: Built-in names. ``ddp`` is an oracle and cannot be chosen as the implementation under test.
BUILTIN = {
    "reference": "fsdp_testkit.backends.reference:ReferenceBackend",
    "transformers": "fsdp_testkit.backends.transformers:TransformersBackend",
    "ddp": "fsdp_testkit.backends.ddp:DDPBackend",
}


def make_backend(name: str) -> Backend:
    """Import and instantiate a backend: a built-in name or ``package.module:Class``.

    Raises:
        UsageError: the name is unknown, cannot be imported, or is no `Backend`.
    """
    target = BUILTIN.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise UsageError(f"backend={name!r} must be one of {', '.join(BUILTIN)} or 'package.module:Class'")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"backend={name!r} cannot be imported: {error}") from error
    backend = factory()
    if not isinstance(backend, Backend):
        missing = [item for item in _MEMBERS if not hasattr(backend, item)]
        raise UsageError(f"backend={name!r} is no Backend: it lacks {', '.join(missing)}")
    known = CAPABILITIES | PROMISES
    if unknown := sorted(set(backend.capabilities) - known):
        raise UsageError(f"backend={name!r} names unknown capabilities {unknown}; known: {sorted(known)}")
    return backend


_MEMBERS = (
    "name",
    "capabilities",
    "load",
    "make_optimizer",
    "train_step",
    "save",
    "save_training",
    "load_training",
)
