"""The kit in one process: an engine that is made when it is first needed, and the ledger over its rows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fsdp_testkit.core.errors import KitError
from fsdp_testkit.core.result import Result
from fsdp_testkit.core.versions import check_supported
from fsdp_testkit.engine.ledger import Ledger
from fsdp_testkit.plugin.options import EngineOptions

if TYPE_CHECKING:
    from fsdp_testkit.core.case import ModelSpec
    from fsdp_testkit.ranks import Hosts, Slots


class EngineLike(Protocol):
    """What the plugin needs of an engine. A method ``expect`` as `Engine` has it is used where there is one."""

    def run_test(self, spec: ModelSpec, test: str, variant: str) -> list[Result]:
        """Run one test and return its rows."""
        ...

    def close(self) -> None:
        """Stop everything that was started."""
        ...


class KitSession:
    """The engine and the ledger of one process: a pytest session, an xdist worker or a unittest run.

    Nothing starts before the first `run`. At most one engine is alive: the ranks of two would compete.
    """

    def __init__(
        self, options: EngineOptions, ledger: Ledger, make_engine: Callable[[EngineOptions], EngineLike]
    ) -> None:
        self.options = options
        self.ledger = ledger
        self._make_engine = make_engine
        self._engine: EngineLike | None = None
        self._made_with: EngineOptions | None = None

    def run(
        self, spec: ModelSpec, test: str, variant: str, *, together: Sequence[tuple[str, str]] = (), **changes: Any
    ) -> list[Result]:
        """Run one test of one model; at least one row comes back, whatever happens.

        Args:
            spec: the model.
            test: name of the test.
            variant: name of the variant.
            together: (test, variant) of what will be asked for next, this one included.
            changes: fields of `EngineOptions` in which the test class differs from the session.
        """
        options = replace(self.options, **changes)
        try:
            engine = self._engine_for(options)
            if together and (expect := getattr(engine, "expect", None)) is not None:
                expect(spec, together)
            rows = engine.run_test(spec, test, variant)
        except Exception as error:  # a broken engine is a row too: every model is accounted for
            row = error_row(spec.model_type, test, variant, options.backend, f"{type(error).__name__}: {error}")
            if not isinstance(error, KitError):
                row.extra["traceback"] = traceback.format_exc()
            rows = [row]
        if not rows:
            rows = [error_row(spec.model_type, test, variant, options.backend, "the engine returned no row")]
        return [self.ledger.apply(_heard(row)) for row in rows]

    def close(self) -> None:
        """Stop the engine; a later `run` makes a new one."""
        engine, self._engine, self._made_with = self._engine, None, None
        if engine is not None:
            engine.close()

    def _engine_for(self, options: EngineOptions) -> EngineLike:
        if self._engine is None or self._made_with != options:
            self.close()
            self._engine = self._make_engine(options)
            self._made_with = options
        return self._engine


def own_engine(options: EngineOptions, slots: Slots | None = None, hosts: Hosts | None = None) -> EngineLike:
    """Return the kit's own engine, whose jobs wait for ``slots`` and run on ``hosts``.

    Raises:
        EnvironmentLacksError: torch or transformers is missing, or outside the versions that were run.
    """
    if not os.environ.get("FSDP_TESTKIT_ANY_VERSION"):
        check_supported()
    from fsdp_testkit.engine.engine import Engine, Settings

    return Engine(
        Settings(
            backend=options.backend,
            device=options.device,
            start_method=options.start_method,
            seed=options.seed,
            deadline=options.deadline,
            fault=options.fault,
            trust_remote_code=options.trust_remote_code,
        ),
        slots,
        hosts,
    )


def error_row(model_type: str, test: str, variant: str, backend: str, reason: str) -> Result:
    """Return a row that says why nothing could be judged."""
    return Result(
        model_type=model_type,
        test=test,
        variant=variant,
        layout="none",
        backend=backend,
        outcome="error",
        reason=reason,
    )


def _heard(row: Result) -> Result:
    """Return the row; a pass that checked nothing is an error, since silence is no success."""
    if row.outcome == "passed" and row.checks < 1:
        return replace(row, outcome="error", reason="passed without a single check: nothing was looked at")
    return row
