"""Arming a fault inside a rank, and counting that it was hit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.backends.registry import make_backend
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.errors import UsageError

#: Name of the files in which hits are tallied, one byte a hit; the rank follows.
TALLY = "fault_hits"


class ArmedFault(Protocol):
    """A mutation that is active on one rank."""

    tally: Path | None

    def arm(self, *, rank: int, world_size: int, case: Case) -> contextlib.AbstractContextManager[None]:
        """Patch torch functions and undo it completely on leaving."""
        ...

    def wrap(self, backend: Backend) -> Backend:
        """Return the backend, or a mutated one."""
        ...


def make_fault(name: str) -> ArmedFault:
    """Import and instantiate ``package.module:Class``.

    Raises:
        UsageError: it cannot be imported or is no fault.
    """
    module_name, colon, class_name = name.partition(":")
    try:
        if not colon:
            raise ImportError("no ':' in it")
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"fault={name!r} must be 'package.module:Class': {error}") from error
    fault: Any = factory()
    if not hasattr(fault, "arm") or not hasattr(fault, "wrap"):
        raise UsageError(f"fault={name!r} must offer arm() and wrap(); see fsdp_testkit.faults.base.Fault")
    armed: ArmedFault = fault
    return armed


@contextlib.contextmanager
def armed(case: Case, context: Any) -> Iterator[Backend]:
    """Make the case's backend, arm its fault if it has one, and yield the backend to use.

    Hits are tallied in a file of the job's folder as they happen, so that they count where a rank dies too.
    """
    backend = make_backend(case.backend)
    if not case.fault:
        yield backend
        return
    fault = make_fault(case.fault)
    fault.tally = context.folder / f"{TALLY}.{context.rank}"
    with fault.arm(rank=context.rank, world_size=case.layout.world_size, case=case):
        yield fault.wrap(backend)
