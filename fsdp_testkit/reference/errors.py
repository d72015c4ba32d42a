"""What goes wrong, by whose fault. All are `ValueError`s: the caller's input was not usable."""

from __future__ import annotations

from collections.abc import Iterable


class ReferenceLoaderError(ValueError):
    """Base of the errors of this package."""


class PlanError(ReferenceLoaderError):
    """The plan is malformed or does not fit the model."""


class LoadError(ReferenceLoaderError):
    """The checkpoint is unreadable or does not fit the model. ``problems`` lists each finding."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class BindError(ReferenceLoaderError):
    """An optimizer does not fit the sharded model. ``problems`` lists each finding."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class SaveError(ReferenceLoaderError):
    """The model or the target folder does not allow a save."""


class TrainingStateError(ReferenceLoaderError):
    """A training state is missing, foreign, or does not fit model, optimizer or scheduler."""


class SwitchError(ReferenceLoaderError):
    """An environment switch cannot be set, or has no effect."""
