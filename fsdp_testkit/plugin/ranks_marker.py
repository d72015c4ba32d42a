"""``@pytest.mark.ranks(4)``: the test function runs on four ranks, with its process group ready.

```python
@pytest.mark.ranks(2)
def test_all_reduce(rank, world_size):
    tensor = torch.tensor([rank + 1.0])
    dist.all_reduce(tensor)
    assert tensor.item() == 3.0
```

Fixtures and parameters are evaluated once, in the parent; their values travel as JSON, and `per_rank` gives each rank
its own. Subtests of pytest's fixture ``subtests`` are reported for each rank. The fixture ``on_ranks`` runs any
function of a module and gives what each rank returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fsdp_testkit.core.errors import KitError, UsageError
from fsdp_testkit.plugin.deadline import marked_deadline
from fsdp_testkit.plugin.hosts import session_hosts
from fsdp_testkit.plugin.options import RUN_OPTIONS
from fsdp_testkit.plugin.rank_subtests import report_subtests
from fsdp_testkit.plugin.slots import session_slots
from fsdp_testkit.plugin.values import PerRank, pack
from fsdp_testkit.ranks import Harness, Job, JobReport, pick_comm
from fsdp_testkit.ranks.gpus import visible
from fsdp_testkit.ranks.job import STALL

#: What each rank returned, by rank: ``item.stash[RANK_VALUES]``.
RANK_VALUES = pytest.StashKey[list[Any]]()
_HARNESS = pytest.StashKey[Harness]()
#: Arguments that the ranks fill in themselves.
OWN = ("rank", "world_size", "rank_context")
#: What the marker takes by name, with the fields of `Job` that are meant where it is not given.
OPTIONS: dict[str, Any] = {"device": "cpu", "comm": "", "env": {}, "stall": STALL}
PRELOAD = ("torch.distributed", "pytest", "fsdp_testkit.plugin.on_rank")
_OUTPUT_SHOWN = 4000


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> int:
    """Rank of this process, from 0; for tests marked ``ranks``."""
    return _placeholder(request, "rank")


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """Give the number of ranks, to tests marked ``ranks``."""
    return _placeholder(request, "world_size")


@pytest.fixture
def rank_context(request: pytest.FixtureRequest) -> int:
    """Give the `RankContext`, to tests marked ``ranks``."""
    return _placeholder(request, "rank_context")


def _placeholder(request: pytest.FixtureRequest, name: str) -> int:
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail(f"{name} is for tests marked @pytest.mark.ranks(count)", pytrace=False)
    return -1


@pytest.fixture
def on_ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a function on ranks: ``on_ranks(function, 4, x=1)`` returns what each rank returned, by rank.

    The function is one of a module, not of another function; it may take ``rank``, ``world_size``, ``rank_context``
    and ``subtests``. ``device``, ``comm``, ``env`` and ``stall`` are those of `Job`.
    """

    def run(
        function: Callable[..., Any],
        count: int,
        *,
        device: str = "cpu",
        comm: str = "",
        env: dict[str, str] | None = None,
        stall: float = STALL,
        **arguments: Any,
    ) -> list[Any]:
        taken = inspect.signature(function).parameters
        wants = [name for name in OWN if name in taken]
        if "subtests" in taken and "subtests" not in arguments:
            arguments["subtests"] = request.getfixturevalue("subtests")
        how = {"device": device, "comm": comm, "env": env or {}, "stall": stall}
        return _run(request.node, function, count, how, wants, arguments)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run a marked test function on its ranks instead of here."""
    if (mark := pyfuncitem.get_closest_marker("ranks")) is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name not in OWN}
    wants = [name for name in names if name in OWN]
    count, how = _read(mark)
    pyfuncitem.stash[RANK_VALUES] = _run(pyfuncitem, pyfuncitem.obj, count, how, wants, arguments)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse what cannot run on ranks before anything runs."""
    for item in items:
        if (mark := item.get_closest_marker("ranks")) is None:
            continue
        count, _ = _read(mark)
        for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
            if isinstance(value, PerRank) and len(value.values) != count:
                raise pytest.UsageError(
                    f"fsdp_testkit: {item.nodeid}: {name}={value!r} must have one value for each of {count} ranks"
                )
        if not isinstance(item, pytest.Function) or hasattr(item.cls, "assertEqual"):
            raise pytest.UsageError(
                f"fsdp_testkit: {item.nodeid}: @pytest.mark.ranks is for test functions and methods of plain classes, "
                "not for unittest.TestCase"
            )
        if inspect.iscoroutinefunction(item.function):
            raise pytest.UsageError(f"fsdp_testkit: {item.nodeid}: @pytest.mark.ranks cannot run a coroutine")


def _read(mark: pytest.Mark) -> tuple[int, dict[str, Any]]:
    """Return the number of ranks and the fields of `Job` that a marker asks for."""
    try:
        if len(mark.args) != 1 or mark.kwargs.keys() - OPTIONS.keys():
            raise UsageError(f"it takes the number of ranks, and by name {', '.join(OPTIONS)}")
        how = {**OPTIONS, **mark.kwargs}
        _job(mark.args[0], how, {}, 60.0, "")
    except UsageError as error:
        raise pytest.UsageError(f"fsdp_testkit: @pytest.mark.ranks{mark.args}: {error}") from None
    return mark.args[0], how


def default_comm(device: str, count: int, gpus: int) -> str:
    """Return the process group for ``count`` ranks; where something is impossible `Job` or the ranks say so."""
    if device != "cuda":
        return "gloo"
    return pick_comm(device, count, gpus)[0] if gpus and count > 0 else "nccl"


def _job(count: int, how: dict[str, Any], args: dict[str, Any], deadline: float, name: str) -> Job:
    comm = how["comm"] or default_comm(how["device"], count, len(visible()))
    return Job(
        target="fsdp_testkit.plugin.on_rank:call",
        args=args,
        world_size=count,
        device=how["device"],
        comm=comm,
        env=how["env"],
        stall=how["stall"],
        deadline=deadline,
        name=name,
    )


def _run(
    item: pytest.Item,
    function: Callable[..., Any],
    count: int,
    how: dict[str, Any],
    wants: list[str],
    arguments: dict[str, Any],
) -> list[Any]:
    # pytest's own stays here; one that a test brings is an argument like any other
    subtests = arguments.get("subtests")
    if isinstance(subtests, pytest.Subtests):
        arguments = {name: value for name, value in arguments.items() if name != "subtests"}
        wants = [*wants, "subtests"]
    seconds = marked_deadline(item) or item.config.stash[RUN_OPTIONS].engine.deadline
    try:
        args = _place(function) | {
            "wants": wants,
            "args": {name: pack(name, value, count) for name, value in arguments.items()},
        }
        report = _harness(item.config).run(_job(count, how, args, seconds, item.name))
    except KitError as error:
        raise pytest.fail.Exception(f"fsdp_testkit: {error}", pytrace=False) from None
    try:
        if isinstance(subtests, pytest.Subtests):
            report_subtests(subtests, report.folder, count)
        return _conclude(item, report)
    finally:
        report.discard()


def _place(function: Callable[..., Any]) -> dict[str, Any]:
    """Return where ranks find a function."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    path = getattr(plain, "__qualname__", "")
    name = getattr(plain, "__module__", "")
    *owner, last = path.split(".")
    file = inspect.getsourcefile(plain) if inspect.isfunction(plain) else None
    if file is None or "<" in path:
        raise UsageError(f"{path or function!r} cannot run on ranks: it must be a function or method of a module")
    if hasattr(function, "__self__"):
        # a test that a class has inherited from another module belongs to the class that was collected
        owner = type(function.__self__).__qualname__.split(".")
        name = type(function.__self__).__module__
        file = inspect.getsourcefile(type(function.__self__)) or file
    return {"file": file, "module": name, "owner": owner, "function": last}


def _conclude(item: pytest.Item, report: JobReport) -> list[Any]:
    """Tell pytest what came of a job; return what the ranks returned."""
    for reply in report.replies:
        if reply.stderr.strip():
            item.add_report_section("call", f"output of rank {reply.rank}", reply.stderr[-_OUTPUT_SHOWN:])
    if report.notes:
        item.add_report_section("call", "notes of the ranks", "\n".join(report.notes))
    if report.outcome == "skipped":
        pytest.skip(report.skip_reason)
    if all(reply.status == "raised" and reply.error.startswith("XFailed") for reply in report.replies):
        pytest.xfail(report.replies[0].error.partition(": ")[2])
    if report.failure is not None:
        pytest.fail(report.failure.render(), pytrace=False)
    return [reply.value for reply in report.replies]


def _harness(config: pytest.Config) -> Harness:
    if _HARNESS not in config.stash:
        method = config.stash[RUN_OPTIONS].engine.start_method
        config.stash[_HARNESS] = made = Harness(
            start_method=method,
            preload=PRELOAD,
            slots=session_slots(config),
            scale_deadlines=True,
            hosts=session_hosts(config),
        )
        config.add_cleanup(made.close)
    return config.stash[_HARNESS]
