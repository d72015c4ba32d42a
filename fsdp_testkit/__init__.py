"""Distributed correctness tests for FSDP2 training.

The names below are imported when they are first used: ``import fsdp_testkit`` costs milliseconds, and neither
torch nor transformers is imported by it.

PYTEST_DONT_REWRITE: pytest would warn where a session imported the package before the plugin was loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsdp_testkit.backends.base import Backend
    from fsdp_testkit.core.case import Case, ModelSpec
    from fsdp_testkit.core.evidence import Evidence
    from fsdp_testkit.core.finding import Finding
    from fsdp_testkit.core.layout import Layout
    from fsdp_testkit.core.result import Result
    from fsdp_testkit.plugin.matrix import ModelMatrix
    from fsdp_testkit.plugin.mixin import FSDPTesterMixin
    from fsdp_testkit.plugin.values import per_rank
    from fsdp_testkit.reference import load_sharded, save_sharded

    __version__: str

__all__ = [
    "Backend",
    "Case",
    "Evidence",
    "FSDPTesterMixin",
    "Finding",
    "Layout",
    "ModelMatrix",
    "ModelSpec",
    "Result",
    "__version__",
    "load_sharded",
    "per_rank",
    "save_sharded",
]

#: Public name -> (module, name there).
_HOMES = {
    "Backend": ("fsdp_testkit.backends.base", "Backend"),
    "Case": ("fsdp_testkit.core.case", "Case"),
    "Evidence": ("fsdp_testkit.core.evidence", "Evidence"),
    "FSDPTesterMixin": ("fsdp_testkit.plugin.mixin", "FSDPTesterMixin"),
    "Finding": ("fsdp_testkit.core.finding", "Finding"),
    "Layout": ("fsdp_testkit.core.layout", "Layout"),
    "ModelMatrix": ("fsdp_testkit.plugin.matrix", "ModelMatrix"),
    "ModelSpec": ("fsdp_testkit.core.case", "ModelSpec"),
    "Result": ("fsdp_testkit.core.result", "Result"),
    "__version__": ("fsdp_testkit.core.versions", "KIT_VERSION"),
    "load_sharded": ("fsdp_testkit.reference", "load_sharded"),
    "per_rank": ("fsdp_testkit.plugin.values", "per_rank"),
    "save_sharded": ("fsdp_testkit.reference", "save_sharded"),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
