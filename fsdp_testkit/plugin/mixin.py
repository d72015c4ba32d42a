"""`FSDPTesterMixin`: the kit's tests as methods, for pytest classes, `unittest.TestCase`, and transformers' own.

Names start with ``test_kit_`` and private ones with ``_fsdp_kit_``, so that the mixin can stand beside
transformers' own in one class.
"""

from __future__ import annotations

import atexit
import difflib
import unittest
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import BAD_OUTCOMES, Result
from fsdp_testkit.engine.catalogue_of_tests import TESTS, TIERS, of_tier
from fsdp_testkit.engine.ledger import Ledger
from fsdp_testkit.plugin import options as checks
from fsdp_testkit.plugin import source
from fsdp_testkit.plugin.company import company
from fsdp_testkit.plugin.deadline import marked_deadline
from fsdp_testkit.plugin.lifetime import SESSION
from fsdp_testkit.plugin.options import TRUST, EngineOptions
from fsdp_testkit.plugin.rows import ROWS
from fsdp_testkit.plugin.session import KitSession, error_row, own_engine
from fsdp_testkit.reporting.failure import failure_text

PREFIX = "test_kit_"
#: Attributes that a subclass may set, for the explanation of a misspelt one.
_ATTRIBUTES = ("fsdp_backend", "fsdp_deadline", "fsdp_seed", "fsdp_tests", "fsdp_tier", TRUST)


def method_name(test: str, variant: str) -> str:
    """Return the name of the method that runs a test: ``test_kit_hsdp_vs_ddp_tied``, ``test_kit_dcp``."""
    return f"{PREFIX}{test}" if variant == "default" else f"{PREFIX}{test}_{variant}"


#: Method name -> (test, variant) of all tiers, in the catalogue's order.
ALL_METHODS: dict[str, tuple[str, str]] = {
    method_name(info.name, variant): (info.name, variant) for info in TESTS.values() for variant in info.variants
}
#: The same for what a class has by default: the core tier.
METHODS = {name: cell for name, cell in ALL_METHODS.items() if cell[0] in of_tier("core")}


class FSDPTesterMixin:
    """All tests of the kit for one model.

    Say which model by one of::

        class TestLlama(FSDPTesterMixin):
            model_type = "llama"                  # the kit builds a tiny config

        class TestMine(FSDPTesterMixin):
            config = LlamaConfig(hidden_size=60)  # an instance, a config.json, or a function that returns one

        class TestOwnCode(FSDPTesterMixin):
            config = "path/to/folder"             # with a config.json that names classes in .py files there
            fsdp_trust_remote_code = True         # and the leave to run them

        class LlamaModelTest(CausalLMModelTest, FSDPTesterMixin, unittest.TestCase):
            model_tester_class = LlamaModelTester # transformers' own: model_tester.get_config() is asked

    Attributes:
        model_type: a causal-LM model type of transformers, or with ``config`` any name.
        config: the model's config.
        model_class: the model's class or ``"package.module:Class"``; by default the causal-LM mapping's.
        fsdp_backend: implementation under test; by default what ``--fsdp-backend`` says.
        fsdp_seed: seed of weights, batches and dropout; by default ``--fsdp-seed``.
        fsdp_deadline: seconds for one job; by default ``--fsdp-deadline``. The marker
            ``@pytest.mark.fsdp_deadline(120)`` goes before it; set it for the class, as tests with another
            deadline share no work.
        fsdp_tier: ``core`` or ``extended``; by default ``--fsdp-tier``.
        fsdp_tests: names of the tests to run, of whatever tier; by default all of the tier.
        fsdp_trust_remote_code: whether the code of ``config``'s folder may be run; by default
            ``--fsdp-trust-remote-code``.
    """

    # no values here: beside other bases a default would hide what they set
    model_type: str
    config: Any
    model_class: Any
    fsdp_backend: str
    fsdp_seed: int
    fsdp_deadline: float
    fsdp_tests: tuple[str, ...]
    fsdp_tier: str
    fsdp_trust_remote_code: bool

    _fsdp_kit_role: ClassVar[str] = "mixin"
    _fsdp_kit_methods: ClassVar[dict[str, tuple[str, str]]] = ALL_METHODS
    _fsdp_kit_node: pytest.Item | None = None
    _fsdp_kit_tier: ClassVar[str] = "core"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # before the other bases: transformers wraps every test it finds from here
        _check_attributes(cls)
        if "fsdp_tests" in cls.__dict__:
            cls._fsdp_kit_have(cls.fsdp_tests)
        elif "fsdp_tier" in cls.__dict__ and not hasattr(cls, "fsdp_tests"):
            cls._fsdp_kit_have(of_tier(cls.fsdp_tier))
        super().__init_subclass__(**kwargs)

    @classmethod
    def _fsdp_kit_have(cls, tests: Collection[str]) -> None:
        """Give the class the methods of these tests and take those of all others away."""
        for name, (test, _) in ALL_METHODS.items():
            own = cls.__dict__.get(name)
            if own is None or own is _FUNCTIONS[name]:  # a method that the user wrote stays
                # None is collected neither by pytest nor by unittest
                setattr(cls, name, _FUNCTIONS[name] if test in tests else None)

    @classmethod
    def _fsdp_kit_follow(cls, tier: str) -> None:
        """Have the tests of the session's tier, unless the class chooses for itself."""
        if cls._fsdp_kit_tier != tier and not hasattr(cls, "fsdp_tests") and not hasattr(cls, "fsdp_tier"):
            cls._fsdp_kit_have(of_tier(tier))
            cls._fsdp_kit_tier = tier

    @classmethod
    def _fsdp_kit_model_name(cls) -> str:
        return source.name_of(cls)

    @pytest.fixture(autouse=True)
    def _fsdp_kit_reach(self, request: pytest.FixtureRequest) -> None:
        """Keep the item, which leads to the session's engine. A TestCase cannot take fixtures as arguments."""
        self._fsdp_kit_node = request.node


def _check_attributes(cls: type[FSDPTesterMixin]) -> None:
    """Refuse wrong attributes when the class is made: the message then points at its lines.

    Raises:
        UsageError: the class, the attribute, its value and what it must be.
    """
    own = cls.__dict__
    owner = cls.__name__
    for name in own:
        if name.startswith("fsdp_") and name not in _ATTRIBUTES:
            # transformers has names of its own (fsdp_nproc_per_node): only a near miss is a mistake
            near = difflib.get_close_matches(name, _ATTRIBUTES, n=1, cutoff=0.8)
            if near:
                raise UsageError(f"{owner}.{name} is no attribute of FSDPTesterMixin; did you mean {near[0]}?")
    if "fsdp_backend" in own:
        if not isinstance(cls.fsdp_backend, str):
            raise UsageError(f"{owner}.fsdp_backend={cls.fsdp_backend!r} must be text such as 'reference'")
        checks.check_backend(f"{owner}.fsdp_backend", cls.fsdp_backend)
    if "fsdp_seed" in own:
        checks.seed(f"{owner}.fsdp_seed", cls.fsdp_seed)
    if "fsdp_deadline" in own:
        checks.deadline(f"{owner}.fsdp_deadline", cls.fsdp_deadline)
    if "fsdp_tests" in own:
        _check_tests(owner, cls.fsdp_tests)
    if "fsdp_tier" in own:
        checks.choice(f"{owner}.fsdp_tier", cls.fsdp_tier, TIERS)
    if TRUST in own and not isinstance(cls.fsdp_trust_remote_code, bool):
        raise UsageError(f"{owner}.{TRUST}={cls.fsdp_trust_remote_code!r} must be True or False")
    if own.get("model_type") is not None and getattr(cls, "config", None) is None:
        source.check_model_type(f"{owner}.model_type", own["model_type"])


def _check_tests(owner: str, value: Any) -> None:
    names = ", ".join(TESTS)
    if isinstance(value, str) or not isinstance(value, tuple | list | set | frozenset) or not value:
        raise UsageError(f"{owner}.fsdp_tests={value!r} must be a tuple with at least one of {names}")
    for name in value:
        if name not in TESTS:
            near = difflib.get_close_matches(str(name), TESTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{owner}.fsdp_tests: {name!r} must be one of {names}{hint}")


def _changes(test: FSDPTesterMixin) -> dict[str, Any]:
    """Return in what the class differs from the session's options."""
    names = {"backend": "fsdp_backend", "seed": "fsdp_seed", "deadline": "fsdp_deadline", "trust_remote_code": TRUST}
    return {field: getattr(test, name) for field, name in names.items() if getattr(test, name, None) is not None}


def _run(test: FSDPTesterMixin, name: str, variant: str) -> None:
    """Run one test of the kit; safe to be called again, since transformers retries tests."""
    node = test._fsdp_kit_node
    kit = node.config.stash.get(SESSION, None) if node is not None else None
    kit = kit if kit is not None else _process_session()
    changes = _changes(test)
    if node is not None and (seconds := marked_deadline(node)) is not None:
        changes["deadline"] = seconds
    try:
        spec = source.resolve(test)
    except UsageError as error:
        backend = changes.get("backend", kit.options.backend)
        rows = [error_row(type(test)._fsdp_kit_model_name(), name, variant, backend, str(error))]
    else:
        impossible = getattr(test, "_fsdp_kit_impossible", "")
        rows = (
            [_impossible(spec.model_type, name, variant, changes.get("backend", kit.options.backend), impossible)]
            if impossible
            else kit.run(spec, name, variant, together=company(node) if node is not None else (), **changes)
        )
    if node is not None:
        # set, not appended: a retry replaces the rows of the attempt before
        node.stash[ROWS] = rows
    _conclude(rows, node)


def _conclude(rows: list[Result], node: pytest.Item | None) -> None:
    """Turn rows into what the runner understands: the worst row decides."""
    if node is not None and node.config.getoption("runxfail", default=False):
        rows = [replace(row, outcome="failed") if row.outcome == "xfailed" else row for row in rows]
    outcomes = {row.outcome for row in rows}
    if outcomes & BAD_OUTCOMES:
        text = failure_text(rows)
        if node is not None:
            # the frames of the kit say nothing about the model
            pytest.fail(text, pytrace=False)
        raise AssertionError(text)
    if known := [row for row in rows if row.outcome == "xfailed"]:
        reason = "; ".join(dict.fromkeys(row.reason for row in known))
        if node is not None:
            pytest.xfail(reason)
        raise unittest.SkipTest(f"known failure: {reason}")
    if outcomes <= {"not_applicable", "skipped"}:
        reason = "; ".join(dict.fromkeys(f"{row.outcome.replace('_', ' ')}: {row.reason}" for row in rows))
        if node is not None:
            pytest.skip(reason)
        raise unittest.SkipTest(reason)


def _impossible(model_type: str, test: str, variant: str, backend: str, reason: str) -> Result:
    row = error_row(model_type, test, variant, backend, reason)
    row.outcome = "not_applicable"
    return row


@cache
def _process_session() -> KitSession:
    """Return the session of a process that pytest does not run: default options, no ledger, closed at exit."""
    session = KitSession(EngineOptions(), Ledger(), own_engine)
    atexit.register(session.close)
    return session


def _method(name: str, test: str, variant: str) -> Callable[[FSDPTesterMixin], None]:
    def run(self: FSDPTesterMixin) -> None:
        _run(self, test, variant)

    run.__name__ = name
    run.__qualname__ = f"FSDPTesterMixin.{name}"
    run.__doc__ = f"{TESTS[test].summary} ({variant})." if variant != "default" else f"{TESTS[test].summary}."
    return run


_FUNCTIONS = {name: _method(name, *cell) for name, cell in ALL_METHODS.items()}
for _name in METHODS:
    setattr(FSDPTesterMixin, _name, _FUNCTIONS[_name])
