"""The harness's logic as a pure state machine: (state, event, now) -> (state, actions).

No I/O, no clock, no process: `harness` turns what it sees into events and carries the actions out.

```
looking <──stands still── running ──first failure or skip──> draining ──all settled──┐
   │  └──── not stuck ─────> │ │                                 │ grace over        │
   │                         │ └─────────── deadline ──────> dumping ── stacks are in, or too late ──┐
   │                         └──────────── all settled ─────────────────────────────┴──────────> ending ──> done
   └──── stuck ───────────────────────────────────────────────────────────────────────────────────┘
```

A rank is *settled* when it has replied or its process has ended. A job *stands still* when all ranks that are not
settled sleep; it is *stuck* when each of them sleeps in a collective, where only another rank could wake it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

#: Seconds for the ranks to write their stacks: a few system calls, but the machine may be loaded.
DUMP_LIMIT = 1.5
#: Seconds from SIGKILL to the notice of the end: longer means stuck in the kernel, or a lost server.
REAP_LIMIT = 2.0
#: After the first skip the others get this many times the grace: a skip is decided before anything is shared,
#: but one rank may import much slower than another.
SKIP_PATIENCE = 4.0


class Phase(StrEnum):
    """Where a job stands; see the module's picture."""

    RUNNING = "running"
    LOOKING = "looking"
    DRAINING = "draining"
    DUMPING = "dumping"
    ENDING = "ending"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Replied:
    """A rank sent its result: ``ok``, ``raised`` or ``skipped``."""

    rank: int
    status: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A rank's process has ended: exit status, or minus the number of the signal."""

    rank: int
    code: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's channel is closed: no reply can come, but its end may follow and say more."""

    rank: int


@dataclass(frozen=True, slots=True)
class Unstarted:
    """A rank could not be started."""

    rank: int


@dataclass(frozen=True, slots=True)
class Dumped:
    """A rank's stack is on file, or its rank will never write one."""

    rank: int


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The server that starts these ranks is gone, and they with it; all of them where ``None``."""

    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class StoodStill:
    """No rank that is not settled has done anything for a while."""


@dataclass(frozen=True, slots=True)
class Looked:
    """The stacks that were asked for have been read: whether all these ranks wait in collectives."""

    stuck: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Replied | Exited | Cut | Unstarted | Dumped | ServerLost | StoodStill | Looked | Tick


@dataclass(frozen=True, slots=True)
class Release:
    """Tell these ranks that all have succeeded: they leave the process group and end."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dump:
    """Ask these ranks for their stacks."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """Read the stacks of these ranks, and answer with `Looked`."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL these ranks and all that they started."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Kill the server: ranks did not end although they were killed through it."""


Action = Release | Dump | Look | Kill | Abandon


@dataclass(frozen=True, slots=True)
class RankState:
    """What is known of one rank.

    Attributes:
        status: ``running`` or one of the statuses of `RankReply`.
        code: exit status once the process has ended, else ``None``.
        alive: whether the process may still run.
        settled_at: when the status was decided.
        cut_at: when its channel was closed before it had replied.
        dumped: whether its stack is on file.
        killed: whether the harness has killed it.
    """

    status: str = "running"
    code: int | None = None
    alive: bool = True
    settled_at: float | None = None
    cut_at: float | None = None
    dumped: bool = False
    killed: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands.

    Attributes:
        phase: see `Phase`.
        ranks: state of each rank.
        grace: seconds for the others after the first failure.
        deadline: when the job is ended by force.
        until: when the current phase is over.
        timed_out: whether the deadline, and not a failure, ended it.
        stuck: whether it was ended because it could not go on.
        asked: the ranks that were asked for their stacks while it stood still.
        notes: oddities that are no failures.
    """

    phase: Phase
    ranks: tuple[RankState, ...]
    grace: float
    deadline: float
    until: float
    timed_out: bool = False
    stuck: bool = False
    asked: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def begin(processes: int, *, deadline: float, grace: float, now: float) -> State:
    """Return the state of a job whose ranks are being started; ``deadline`` and ``grace`` in seconds."""
    end = now + deadline
    return State(Phase.RUNNING, (RankState(),) * processes, grace, end, end)


def step(state: State, event: Event, now: float) -> tuple[State, tuple[Action, ...]]:
    """Apply one event.

    Args:
        state: where the job stands.
        event: what was seen.
        now: the clock that ``deadline`` and ``until`` refer to.

    Returns:
        The new state, and what has to be done about it, in order.
    """
    if state.phase is Phase.DONE:
        return state, ()
    state = _apply(state, event, now)
    actions: list[Action] = []
    while True:
        following, done = _advance(state, now)
        actions += done
        if following.phase is state.phase and not done:
            return following, tuple(actions)
        state = following


def _apply(state: State, event: Event, now: float) -> State:
    match event:
        case Replied(rank, status):
            known = state.ranks[rank]
            if known.status == "running":
                return _update(state, rank, status=status, settled_at=now)
            if status == "raised" and any(other.killed for other in state.ranks):
                return state  # it lost its peers because they were killed
            return _note(state, f"rank {rank} replied {status!r} too late: it counts as {known.status}")
        case Exited(rank, code):
            known = state.ranks[rank]
            if known.status == "running":
                state = _update(state, rank, status="died", settled_at=now)
            elif known.status in ("ok", "skipped") and code != 0 and not known.killed:
                how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
                state = _note(state, f"rank {rank} {how} at exit, after it had reported its result")
            return _update(state, rank, code=code, alive=False)
        case Cut(rank):
            return state if state.ranks[rank].status != "running" else _update(state, rank, cut_at=now)
        case Unstarted(rank):
            return _update(state, rank, status="lost", alive=False, settled_at=now)
        case Dumped(rank):
            return _update(state, rank, dumped=True)
        case StoodStill() if state.phase is Phase.RUNNING:
            return replace(state, phase=Phase.LOOKING, until=min(state.deadline, now + DUMP_LIMIT))
        case Looked(stuck) if state.phase is Phase.LOOKING:
            return _judge_look(state, stuck, now)
        case ServerLost(ranks):
            for rank in range(len(state.ranks)) if ranks is None else ranks:
                if state.ranks[rank].status == "running":
                    state = _update(state, rank, status="lost", settled_at=now)
                state = _update(state, rank, alive=False)
            return state
    return state


def _advance(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    running = _where(state, lambda known: known.status == "running")
    alive = _where(state, lambda known: known.alive)
    if state.phase is Phase.LOOKING:
        return _look(state, running, now)
    if state.phase in (Phase.RUNNING, Phase.DRAINING):
        if not running:
            return _end(state, alive, now)
        if now >= state.until:
            timed_out = now >= state.deadline
            for rank in running:
                lost = state.ranks[rank].cut_at is not None
                status = "lost" if lost else "hung" if timed_out else "stopped"
                state = _update(state, rank, status=status, settled_at=now)
            state = replace(state, phase=Phase.DUMPING, until=now + DUMP_LIMIT, timed_out=timed_out)
            return state, (Dump(running),)
        until = min(_drain_limits(state))
        if until < state.until:
            return replace(state, phase=Phase.DRAINING, until=until), ()
        return state, ()
    if state.phase is Phase.DUMPING:
        waiting = _where(state, lambda known: known.status in ("hung", "stopped") and known.alive and not known.dumped)
        if waiting and now < state.until:
            return state, ()
        return _kill(replace(state, phase=Phase.ENDING), alive, now)
    if not alive:
        return replace(state, phase=Phase.DONE), ()
    if now < state.until:
        return state, ()
    unkilled = tuple(rank for rank in alive if not state.ranks[rank].killed)
    if unkilled:
        names = ", ".join(map(str, unkilled))
        state = _note(
            state, f"rank {names} did not end within {state.grace:g} s after all had succeeded, and was killed"
        )
        return _kill(state, alive, now)
    for rank in alive:
        state = _note(state, f"the end of rank {rank} was not observed {REAP_LIMIT:g} s after it was killed")
        state = _update(state, rank, alive=False)
    return replace(state, phase=Phase.DONE), (Abandon(),)


def _look(state: State, running: tuple[int, ...], now: float) -> tuple[State, tuple[Action, ...]]:
    if not state.asked and running and now < state.deadline:
        return replace(state, asked=running), (Dump(running),)
    if not running or running != state.asked or now >= state.deadline:  # something has happened: it did go on
        return _resume(state), ()
    missing = any(not state.ranks[rank].dumped for rank in running)
    if missing and now < state.until:
        return state, ()
    if missing:  # who writes no stack is not known to wait for anybody
        return _resume(state), ()
    # Asked for at once and answered at once: `until` keeps it from being asked for twice.
    return (replace(state, until=state.deadline), (Look(running),)) if state.until < state.deadline else (state, ())


def _judge_look(state: State, stuck: bool, now: float) -> State:
    if not stuck:
        return _resume(state)
    for rank in state.asked:
        state = _update(state, rank, status="hung", settled_at=now)
    return replace(state, phase=Phase.DUMPING, until=now, stuck=True)


def _resume(state: State) -> State:
    for rank in state.asked:
        state = _update(state, rank, dumped=False)
    return replace(state, phase=Phase.RUNNING, until=state.deadline, asked=())


def _end(state: State, alive: tuple[int, ...], now: float) -> tuple[State, tuple[Action, ...]]:
    state = replace(state, phase=Phase.ENDING)
    # Only when all succeeded they leave their group in good order: with a peer gone this may hang or abort.
    if all(known.status == "ok" for known in state.ranks):
        return replace(state, until=now + state.grace), (Release(alive),) if alive else ()
    return _kill(state, alive, now)


def _kill(state: State, ranks: tuple[int, ...], now: float) -> tuple[State, tuple[Action, ...]]:
    for rank in ranks:
        state = _update(state, rank, killed=True)
    return replace(state, until=now + REAP_LIMIT), (Kill(ranks),) if ranks else ()


def _drain_limits(state: State) -> Iterator[float]:
    yield state.until
    for known in state.ranks:
        if known.status == "running" and known.cut_at is not None:
            yield known.cut_at + state.grace
        if known.settled_at is not None and known.status != "ok":
            patience = SKIP_PATIENCE if known.status == "skipped" else 1.0
            yield known.settled_at + patience * state.grace


def _where(state: State, holds: Callable[[RankState], bool]) -> tuple[int, ...]:
    return tuple(rank for rank, known in enumerate(state.ranks) if holds(known))


def _update(state: State, rank: int, **changes: object) -> State:
    known = replace(state.ranks[rank], **changes)  # type: ignore[arg-type]
    return replace(state, ranks=(*state.ranks[:rank], known, *state.ranks[rank + 1 :]))


def _note(state: State, text: str) -> State:
    return replace(state, notes=(*state.notes, text))
