"""What a fault is, and a backend that passes everything on."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from fsdp_testkit.backends.base import Backend, OptimizerConfig, StepOutput
from fsdp_testkit.core.case import Case
from fsdp_testkit.faults.bugs import BUGS


class Fault:
    """A mutation of a backend or of torch on one rank.

    Subclasses override methods of `FaultyBackend` through `wrap`, or patch functions in `arm`; they call
    `hit` each time the mutation really changes something.

    Class attributes: ``story`` (one line), ``thread`` (public report, if it re-creates one), ``test`` and
    ``variant`` (where it shows), ``checks`` (names of checks of which at least one must have a finding),
    ``model`` (a model type that shows it).

    A bug of the museum names itself, ``class TieBroken(Fault, bug="tie-lost-after-to-empty")``; its thread is that
    of `fsdp_testkit.faults.bugs.BUGS`. It also has ``causes`` (of `fsdp_testkit.faults.museum.CAUSES`, the first
    one is the expected one), and where needed: ``fields`` (of `Case`, other than the test's own), ``dropout``,
    ``deadline`` (seconds of a job that hangs), ``says`` (text that a finding's message must hold), ``blamed``
    (the rank that a failure must be attributed to), ``also`` (further (test, variant, check) that must go red).
    """

    story: ClassVar[str] = ""
    thread: ClassVar[str] = ""
    test: ClassVar[str] = "auto_vs_ddp"
    variant: ClassVar[str] = "untied"
    checks: ClassVar[tuple[str, ...]] = ()
    model: ClassVar[str] = "llama"
    bug: ClassVar[str] = ""
    causes: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[tuple[str, Any], ...]] = ()
    dropout: ClassVar[float] = 0.0
    deadline: ClassVar[float] = 0.0
    says: ClassVar[str] = ""
    blamed: ClassVar[int | None] = None
    also: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def __init_subclass__(cls, *, bug: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.bug = bug
        if bug:
            cls.thread = BUGS[bug][0]

    def __init__(self) -> None:
        self.hits = 0
        self.tally: Path | None = None
        self.rank = 0
        self.world_size = 1
        self.case: Case | None = None

    def hit(self) -> None:
        """Count one activation on this rank, also in the tally file: it outlives a rank that dies."""
        self.hits += 1
        if self.tally is not None:
            with self.tally.open("ab") as file:
                file.write(b".")

    @contextlib.contextmanager
    def arm(self, *, rank: int, world_size: int, case: Case) -> Iterator[None]:
        """Learn the rank and apply `patches`; everything is undone on leaving."""
        self.rank, self.world_size, self.case = rank, world_size, case
        with contextlib.ExitStack() as stack:
            for original, replacement in self.patches():
                stack.enter_context(replaced(original, replacement))
            yield

    def patches(self) -> list[tuple[Any, Any]]:
        """Return pairs (function, replacement); every module that holds the function gets the replacement."""
        return []

    def wrap(self, backend: Backend) -> Backend:
        """Return the backend to use."""
        return FaultyBackend(backend, self)

    # what a faulty backend asks at each of its doors; the default changes nothing

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Change the arguments of a load."""
        return arguments

    def after_load(self, model: nn.Module) -> nn.Module:
        """Change a model that was just loaded."""
        return model

    def optimizer_model(self, model: nn.Module) -> nn.Module:
        """Change what the optimizer is built from."""
        return model

    def after_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change an optimizer that was just built."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change state after a training step."""

    def before_save(self, model: nn.Module) -> nn.Module:
        """Change what is saved."""
        return model

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Change files that were just saved."""

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore training state, wrongly."""
        inner.load_training(*arguments)


class FaultyBackend:
    """A backend whose every door leads through a fault."""

    def __init__(self, inner: Backend, fault: Fault) -> None:
        self.inner = inner
        self.fault = fault
        self.name = inner.name
        self.capabilities = inner.capabilities

    def load(self, checkpoint: Path, **arguments: Any) -> nn.Module:
        """Load through the fault."""
        arguments = self.fault.before_load({"checkpoint": checkpoint, **arguments})
        return self.fault.after_load(self.inner.load(arguments.pop("checkpoint"), **arguments))

    def make_optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Build the optimizer through the fault."""
        optimizer = self.inner.make_optimizer(self.fault.optimizer_model(model), config)
        self.fault.after_optimizer(model, optimizer)
        return optimizer

    def train_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, *arguments: Any) -> StepOutput:
        """Train a step, then let the fault act."""
        output = self.inner.train_step(model, optimizer, *arguments)
        self.fault.after_step(model, optimizer)
        return output

    def save(self, model: nn.Module, folder: Path, *, layout: str) -> None:
        """Save through the fault."""
        self.inner.save(self.fault.before_save(model), folder, layout=layout)
        self.fault.after_save(model, folder, layout)

    def save_training(self, *arguments: Any) -> None:
        """Save training state."""
        self.inner.save_training(*arguments)

    def load_training(self, *arguments: Any) -> None:
        """Restore training state through the fault."""
        self.fault.load_training(self.inner, arguments)


def faults_in(*modules: ModuleType) -> list[type[Fault]]:
    """Return the faults that modules define, those of one model and test side by side: they share truth."""
    found = [
        member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Fault) and member.__module__ == module.__name__
    ]
    return sorted(found, key=lambda fault: (fault.model, fault.variant, fault.test, fault.__name__))


@contextlib.contextmanager
def replaced(original: Any, replacement: Any) -> Iterator[None]:
    """Put ``replacement`` wherever a loaded module of this process holds ``original``; undo it on leaving."""
    places = [
        (module, name)
        for module in list(sys.modules.values())
        if module is not None
        for name, value in list(vars(module).items() if hasattr(module, "__dict__") else [])
        if value is original
    ]
    functools.update_wrapper(replacement, original)  # torch looks for attributes of its own functions
    for module, name in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)
