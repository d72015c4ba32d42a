"""The harness's logic as a pure state machine: (state, event, now) -> (state, actions).

No I/O, no clock, no process: `harness` turns what it sees into events and carries the actions out.

```
running ──first failure or skip──> draining ──all settled──┐
   │ │                                 │ grace over        │
   │ └─────────── deadline ──────> dumping ── stacks are in, or too late ──┐
   └──────────── all settled ─────────────────────────────┴──────────> ending ──all reaped──> done
```

A rank is *settled* when it has replied or its process has ended.
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
class Unstarted:
    """A rank could not be started."""

    rank: int


@dataclass(frozen=True, slots=True)
class Dumped:
    """A rank's stack is on file, or its rank will never write one."""

    rank: int


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The server that starts ranks is gone, and all ranks with it."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Replied | Exited | Unstarted | Dumped | ServerLost | Tick


@dataclass(frozen=True, slots=True)
class Release:
    """Tell these ranks that all have succeeded: they leave the process group and end."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dump:
    """Ask these ranks for their stacks."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL these ranks and all that they started."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Kill the server: ranks did not end although they were killed through it."""


Action = Release | Dump | Kill | Abandon


@dataclass(frozen=True, slots=True)
class RankState:
    """What is known of one rank.

    Attributes:
        status: ``running`` or one of the statuses of `RankReply`.
        code: exit status once the process has ended, else ``None``.
        alive: whether the process may still run.
        settled_at: when the status was decided.
        dumped: whether its stack is on file.
        killed: whether the harness has killed it.
    """

    status: str = "running"
    code: int | None = None
    alive: bool = True
    settled_at: float | None = None
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
        notes: oddities that are no failures.
    """

    phase: Phase
    ranks: tuple[RankState, ...]
    grace: float
    deadline: float
    until: float
    timed_out: bool = False
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
        case Unstarted(rank):
            return _update(state, rank, status="lost", alive=False, settled_at=now)
        case Dumped(rank):
            return _update(state, rank, dumped=True)
        case ServerLost():
            for rank, known in enumerate(state.ranks):
                if known.status == "running":
                    state = _update(state, rank, status="lost", settled_at=now)
                state = _update(state, rank, alive=False)
            return state
    return state


def _advance(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    running = _where(state, lambda known: known.status == "running")
    alive = _where(state, lambda known: known.alive)
    if state.phase in (Phase.RUNNING, Phase.DRAINING):
        if not running:
            return _end(state, alive, now)
        if now >= state.until:
            timed_out = now >= state.deadline
            for rank in running:
                state = _update(state, rank, status="hung" if timed_out else "stopped", settled_at=now)
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
