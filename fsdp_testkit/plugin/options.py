"""Command-line options and ini keys, read into plain data and validated before anything starts."""

from __future__ import annotations

import difflib
import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.engine.catalogue_of_tests import TIERS

BACKENDS = ("reference", "transformers")
START_METHODS = ("forkserver", "spawn")
DEVICES = ("cpu", "cuda")
TRUST = "fsdp_trust_remote_code"
#: What an object has to offer to be taken for a backend's class.
_BACKEND_MEMBERS = ("load", "make_optimizer", "train_step", "save")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine is made from; the fields mean what `fsdp_testkit.engine.engine.Settings` says."""

    backend: str = "reference"
    device: str = "cpu"
    start_method: str = "forkserver"
    seed: int = 0
    deadline: float = 60.0
    fault: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the user asked for in this session.

    Attributes:
        engine: what the engine is made from, unless a test class asks for something else.
        models: models of the matrix; ``None`` where the user chose none.
        report: where the JSON report goes.
        ledgers: files with known failures.
        hosts: addresses of agents that start the ranks; none starts them on this machine.
        secret_file: holds the secret that is shared with the agents.
        beyond_loopback: ranks that torchrun has started may listen where other machines reach them.
        slots: ranks that run at the same time over all workers: ``none``, ``cores`` or a number.
        tier: ``core`` or ``extended``.
        counts: file with the number of checks of each test, below which none may fall.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    models: tuple[str, ...] | None = None
    report: Path | None = None
    ledgers: tuple[Path, ...] = ()
    slots: str = "none"
    hosts: tuple[str, ...] = ()
    secret_file: Path | None = None
    beyond_loopback: bool = False
    tier: str = "core"
    counts: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the report."""
        return {
            **asdict(self.engine),
            "models": None if self.models is None else list(self.models),
            "ledgers": [str(path) for path in self.ledgers],
            "tier": self.tier,
        }


RUN_OPTIONS = pytest.StashKey[RunOptions]()

_TEXT_OPTIONS: dict[str, tuple[str, str]] = {
    "models": ("NAMES", "models of the matrix: headline, all, llama,mixtral, path/to/config.json or path/to/folder"),
    "family": ("NAMES", "of the selected models those of these families: dense, moe, hybrid, ..."),
    "backend": ("NAME", "implementation under test: reference, transformers or package.module:Class"),
    "report": ("FILE.json", "write all result rows there; an existing file is replaced at the end"),
    "seed": (
        "N",
        "seed of weights, batches and dropout (default 0); another one for a model whose experts it would not reach",
    ),
    "deadline": ("SECONDS", "time limit of one job on the ranks (default 60)"),
    "tier": ("NAME", "core, or extended for the core tests and more (default core)"),
    "device": ("NAME", "cpu or cuda (default cpu)"),
    "start-method": ("NAME", "forkserver or spawn (default forkserver; spawn with cuda)"),
    "slots": ("N", "ranks at the same time over all xdist workers: a number, cores or none (default none)"),
    "hosts": ("A,B", "machines that start the ranks, where python -m fsdp_testkit ranks is running: host[:port],..."),
    "secret-file": ("FILE", "holds the secret shared with --fsdp-hosts (else in FSDP_TESTKIT_SECRET_FILE or _SECRET)"),
    "fault": ("module:Class", "arm a fault: the checks have to find it"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--fsdp-*`` and the ini keys of the same names."""
    group = parser.getgroup("fsdp", "distributed correctness (fsdp_testkit)")
    for name, (metavar, text) in _TEXT_OPTIONS.items():
        group.addoption(f"--fsdp-{name}", dest=_dest(name), metavar=metavar, default=None, help=text)
        parser.addini(_dest(name), text, type="string", default="")
    text = "with torchrun on several machines: listen beyond loopback; docs/more-than-one-machine.md has the risks"
    group.addoption("--fsdp-beyond-loopback", dest="fsdp_beyond_loopback", action="store_true", help=text)
    text = "run the code of a folder of --fsdp-models whose config.json names classes of its own (auto_map)"
    group.addoption("--fsdp-trust-remote-code", dest=TRUST, action="store_true", default=None, help=text)
    parser.addini(TRUST, text, type="bool", default=False)
    text = "file with known failures (TOML); may be given several times, and adds to the ini key fsdp_ledger"
    group.addoption("--fsdp-ledger", dest="fsdp_ledger", metavar="FILE", action="append", default=None, help=text)
    parser.addini("fsdp_ledger", text, type="paths", default=[])
    text = "file with the number of checks of each test (JSON, by the command counts): a test with fewer fails the run"
    group.addoption("--fsdp-counts", dest="fsdp_counts", metavar="FILE", default=None, help=text)
    parser.addini("fsdp_counts", text, type="string", default="")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the options; on the controller validate them, so that a bad one costs nothing."""
    with usage_errors():
        options = read_options(config)
        if not is_worker(config):
            validate(options)
    config.stash[RUN_OPTIONS] = options


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is an xdist worker."""
    return hasattr(config, "workerinput")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the kit's usage errors into pytest's: one line, exit status 4."""
    try:
        yield
    except (UsageError, EnvironmentLacksError) as error:
        raise pytest.UsageError(f"fsdp_testkit: {error}") from None


def read_options(config: pytest.Config) -> RunOptions:
    """Return the options of this session.

    Raises:
        UsageError: a value has the wrong form.
    """

    def text(name: str) -> str | None:
        given = config.getoption(_dest(name))
        return given if given is not None else (config.getini(_dest(name)) or None)

    device = choice("--fsdp-device", text("device") or "cpu", DEVICES)
    # forked processes cannot use CUDA once their parent has
    start_method = text("start-method") or ("spawn" if device == "cuda" else "forkserver")
    here = config.invocation_params.dir
    root = config.inipath.parent if config.inipath is not None else config.rootpath
    report = config.getoption("fsdp_report")
    ini_report = config.getini("fsdp_report")
    counts = config.getoption("fsdp_counts")
    ini_counts = config.getini("fsdp_counts")
    return RunOptions(
        engine=EngineOptions(
            backend=text("backend") or "reference",
            device=device,
            start_method=choice("--fsdp-start-method", start_method, START_METHODS),
            seed=seed("--fsdp-seed", text("seed") or "0"),
            deadline=deadline("--fsdp-deadline", text("deadline") or "60"),
            fault=text("fault") or "",
            trust_remote_code=bool(config.getoption(TRUST) or config.getini(TRUST)),
        ),
        models=_models(text("models"), text("family")),
        beyond_loopback=config.getoption("fsdp_beyond_loopback"),
        slots=_slots(text("slots") or "none"),
        hosts=tuple(filter(None, (text("hosts") or "").replace(" ", "").split(","))),
        secret_file=here / given if (given := text("secret-file")) else None,
        tier=choice("--fsdp-tier", text("tier") or "core", TIERS),
        report=here / report if report is not None else (root / ini_report if ini_report else None),
        counts=here / counts if counts is not None else (root / ini_counts if ini_counts else None),
        ledgers=(
            *config.getini("fsdp_ledger"),
            *(here / path for path in config.getoption("fsdp_ledger") or ()),
        ),
    )


def validate(options: RunOptions) -> None:
    """Check what needs a look at the machine: classes, paths, ledgers.

    Raises:
        UsageError: the value and what it must be.
    """
    from fsdp_testkit.engine.ledger import Ledger
    from fsdp_testkit.models.own_code import check_code
    from fsdp_testkit.reporting.counts import read_counts
    from fsdp_testkit.reporting.report import check_target

    check_backend("--fsdp-backend", options.engine.backend)
    if options.engine.fault:
        load_class("--fsdp-fault", options.engine.fault)
    for folder in filter(os.path.isdir, options.models or ()):
        trusted = options.engine.trust_remote_code
        check_code("--fsdp-models", folder, trusted=trusted, option="--fsdp-trust-remote-code")
    Ledger.load(options.ledgers)
    if options.counts is not None:
        read_counts(options.counts)
    if options.report is not None:
        check_target(options.report)


def check_backend(name: str, value: str) -> None:
    """Refuse a backend that is neither built in nor an importable class with a backend's methods.

    Raises:
        UsageError: the value and what it must be.
    """
    if value in BACKENDS:
        return
    if ":" not in value:
        near = difflib.get_close_matches(value, BACKENDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{name}={value!r} must be one of {', '.join(BACKENDS)}, or package.module:Class{hint}")
    kind = load_class(name, value)
    if missing := [member for member in _BACKEND_MEMBERS if not hasattr(kind, member)]:
        raise UsageError(f"{name}={value!r} is no backend: it lacks {', '.join(missing)}")


def load_class(name: str, value: str) -> Any:
    """Return the object that ``package.module:Class`` names.

    Raises:
        UsageError: it has another form or cannot be imported; the message has the reason.
    """
    module, colon, path = value.partition(":")
    if not (module and colon and path):
        raise UsageError(f"{name}={value!r} must look like package.module:Class")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UsageError(f"{name}={value!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UsageError(f"{name}={value!r} must be a class; it is {found!r}"[:300])
    return found


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is allowed; else raise `UsageError`."""
    if value not in allowed:
        raise UsageError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    return value


def seed(name: str, value: Any) -> int:
    """Return ``value`` as a seed; raise `UsageError` where it is no integer in [0, 2**32)."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool | float) or not 0 <= number < 2**32:
        raise UsageError(f"{name}={value!r} must be an integer in [0, 2**32)")
    return number


def deadline(name: str, value: Any) -> float:
    """Return ``value`` as a time limit in seconds; raise `UsageError` where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise UsageError(f"{name}={value!r} must be a number of seconds above 0")
    return number


def _slots(value: str) -> str:
    if value not in ("none", "cores") and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UsageError(f"--fsdp-slots={value!r} must be 'none', 'cores' or a number of at least 1")
    return value


def _models(value: str | None, families: str | None) -> tuple[str, ...] | None:
    if value is None and families is None:
        return None
    from fsdp_testkit.models.catalogue import is_path, select
    from fsdp_testkit.models.families import of_families

    try:
        chosen = select("all" if value is None else value)
    except UsageError as error:
        raise UsageError(f"--fsdp-models: {error}") from None
    if families is not None:
        try:
            chosen = of_families(chosen, families)
        except UsageError as error:
            raise UsageError(f"--fsdp-family: {error}") from None
    return tuple(os.fspath(Path(item).resolve()) if is_path(item) else item for item in chosen)


def _dest(name: str) -> str:
    return f"fsdp_{name.replace('-', '_')}"
