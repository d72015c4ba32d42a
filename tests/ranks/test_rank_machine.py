"""The state machine, without a process."""

from __future__ import annotations

import itertools
import random

import pytest

from fsdp_testkit.ranks.machine import (
    DUMP_LIMIT,
    REAP_LIMIT,
    SKIP_PATIENCE,
    Abandon,
    Cut,
    Dump,
    Dumped,
    Exited,
    Kill,
    Look,
    Looked,
    Phase,
    Release,
    Replied,
    ServerLost,
    State,
    StoodStill,
    Tick,
    Unstarted,
    begin,
    step,
)

DEADLINE = 60.0
GRACE = 3.0


class Play:
    """Feeds events and collects actions."""

    def __init__(self, processes: int = 2) -> None:
        self.state: State = begin(processes, deadline=DEADLINE, grace=GRACE, now=0.0)
        self.actions: list[object] = []

    def at(self, now: float, *events: object) -> list[object]:
        got: list[object] = []
        for event in events or (Tick(),):
            self.state, actions = step(self.state, event, now)  # type: ignore[arg-type]
            got += actions
        self.actions += got
        return got

    @property
    def statuses(self) -> list[str]:
        return [rank.status for rank in self.state.ranks]


def test_success_releases_all_ranks_together() -> None:
    play = Play()
    assert play.at(1, Replied(0, "ok")) == []
    assert play.at(50, Tick()) == []
    assert play.at(51, Replied(1, "ok")) == [Release((0, 1))]
    assert play.state.phase is Phase.ENDING
    assert play.at(52, Exited(0, 0), Exited(1, 0)) == []
    assert play.state.phase is Phase.DONE
    assert play.statuses == ["ok", "ok"]
    assert play.state.notes == ()


def test_no_event_changes_a_finished_job() -> None:
    play = Play(1)
    play.at(1, Replied(0, "ok"), Exited(0, 0))
    done = play.state
    assert play.at(2, Replied(0, "raised"), Exited(0, -9), ServerLost(), Tick()) == []
    assert play.state is done


@pytest.mark.parametrize("code", [0, 3, -9])
def test_an_end_without_a_reply_is_a_death(code: int) -> None:
    play = Play()
    play.at(1, Exited(1, code))
    assert play.statuses == ["running", "died"]
    assert play.state.phase is Phase.DRAINING
    assert play.state.ranks[1].code == code


def test_others_get_the_grace_then_a_stack_then_the_end() -> None:
    play = Play()
    play.at(1, Replied(1, "raised"), Exited(1, 1))
    assert play.state.until == 1 + GRACE
    assert play.at(1 + GRACE - 0.01) == []
    assert play.at(1 + GRACE) == [Dump((0,))]
    assert play.statuses == ["stopped", "raised"]
    assert play.at(4.1, Dumped(0)) == [Kill((0,))]
    play.at(4.2, Exited(0, -9))
    assert play.state.phase is Phase.DONE
    assert not play.state.timed_out


def test_a_second_failure_within_the_grace_ends_the_wait() -> None:
    play = Play()
    play.at(1, Replied(1, "raised"), Exited(1, 1))
    play.at(2, Replied(0, "raised"))
    assert play.state.phase is Phase.ENDING
    play.at(2.1, Exited(0, 1))
    assert play.state.phase is Phase.DONE
    assert play.statuses == ["raised", "raised"]


def test_the_deadline_asks_all_silent_ranks_for_their_stacks() -> None:
    play = Play(3)
    play.at(1, Replied(0, "ok"))
    assert play.at(DEADLINE) == [Dump((1, 2))]
    assert play.statuses == ["ok", "hung", "hung"]
    assert play.state.timed_out
    play.at(DEADLINE + 0.1, Dumped(1))
    assert play.at(DEADLINE + DUMP_LIMIT) == [Kill((0, 1, 2))]
    play.at(DEADLINE + DUMP_LIMIT, Exited(0, -9), Exited(1, -9), Exited(2, -9))
    assert play.state.phase is Phase.DONE
    assert play.state.notes == ()


def test_a_failure_just_before_the_deadline_does_not_extend_it() -> None:
    play = Play()
    play.at(DEADLINE - 0.5, Replied(0, "raised"))
    assert play.at(DEADLINE) == [Dump((1,))]


def test_a_reply_after_the_deadline_does_not_count() -> None:
    play = Play()
    play.at(DEADLINE)
    play.at(DEADLINE + 0.1, Replied(0, "ok"))
    assert play.statuses == ["hung", "hung"]
    assert play.state.notes == ("rank 0 replied 'ok' too late: it counts as hung",)


def test_a_process_that_cannot_be_reaped_ends_with_the_server() -> None:
    play = Play(1)
    play.at(DEADLINE)
    play.at(DEADLINE + DUMP_LIMIT)
    assert play.at(DEADLINE + DUMP_LIMIT + REAP_LIMIT) == [Abandon()]
    assert play.state.phase is Phase.DONE
    assert "the end of rank 0 was not observed" in play.state.notes[0]


def test_the_longest_way_ends_within_five_seconds_of_the_deadline() -> None:
    assert DUMP_LIMIT + REAP_LIMIT < 5


def test_an_abort_after_success_is_a_note() -> None:
    play = Play()
    play.at(1, Replied(0, "ok"), Replied(1, "ok"))
    play.at(1.1, Exited(0, 0), Exited(1, -6))
    assert play.statuses == ["ok", "ok"]
    assert play.state.notes == ("rank 1 was ended by signal 6 at exit, after it had reported its result",)


def test_a_rank_that_does_not_end_after_success_is_killed_and_noted() -> None:
    play = Play()
    play.at(1, Replied(0, "ok"), Replied(1, "ok"), Exited(0, 0))
    assert play.at(1 + GRACE) == [Kill((1,))]
    play.at(1 + GRACE, Exited(1, -9))
    assert play.statuses == ["ok", "ok"]
    assert play.state.notes == ("rank 1 did not end within 3 s after all had succeeded, and was killed",)


def test_a_skip_waits_longer_than_a_failure() -> None:
    play = Play()
    play.at(1, Replied(0, "skipped"))
    assert play.state.until == 1 + SKIP_PATIENCE * GRACE
    assert play.at(10, Replied(1, "skipped")) == [Kill((0, 1))]
    play.at(10, Exited(0, -9), Exited(1, -9))
    assert play.statuses == ["skipped", "skipped"]
    assert play.state.notes == ()


def test_a_failure_after_a_skip_shortens_the_wait() -> None:
    play = Play(3)
    play.at(1, Replied(0, "skipped"))
    play.at(2, Replied(1, "raised"))
    assert play.state.until == 2 + GRACE


def test_a_lone_skip_stops_the_others() -> None:
    play = Play()
    play.at(1, Replied(0, "skipped"))
    play.at(1 + SKIP_PATIENCE * GRACE)
    assert play.statuses == ["skipped", "stopped"]


def test_a_rank_that_could_not_be_started() -> None:
    play = Play()
    play.at(0.1, Unstarted(1))
    assert play.statuses == ["running", "lost"]
    assert play.state.phase is Phase.DRAINING


def test_a_job_that_is_stuck_ends_before_its_deadline() -> None:
    play = Play(3)
    play.at(1, Replied(2, "ok"))
    assert play.at(10, StoodStill()) == [Dump((0, 1))]
    assert play.at(10.1, Dumped(0)) == []
    assert play.at(10.2, Dumped(1)) == [Look((0, 1))]
    assert play.at(10.2, Tick()) == [], "it is asked for once"
    assert play.at(10.2, Looked(stuck=True)) == [Kill((0, 1, 2))]
    play.at(10.3, *(Exited(rank, -9) for rank in range(3)))
    assert play.state.phase is Phase.DONE
    assert play.statuses == ["hung", "hung", "ok"]
    assert (play.state.stuck, play.state.timed_out, play.state.notes) == (True, False, ())


def test_a_job_that_is_not_stuck_goes_on() -> None:
    play = Play()
    play.at(10, StoodStill(), Dumped(0), Dumped(1), Looked(stuck=False))
    assert (play.state.phase, play.state.until) == (Phase.RUNNING, DEADLINE)
    assert play.at(20, StoodStill()) == [Dump((0, 1))], "and may be looked at again"


@pytest.mark.parametrize(
    ("event", "phase"), [(Replied(0, "ok"), Phase.RUNNING), (Replied(0, "raised"), Phase.DRAINING)]
)
def test_a_job_that_moves_while_it_is_looked_at_goes_on(event: object, phase: Phase) -> None:
    play = Play()
    play.at(10, StoodStill(), Dumped(1), event)
    assert play.state.phase is phase
    assert play.at(10.1, Dumped(0), Looked(stuck=True)) == []
    assert play.statuses[1] == "running"


def test_who_writes_no_stack_is_not_taken_to_be_stuck() -> None:
    play = Play()
    play.at(10, StoodStill(), Dumped(1))
    assert play.at(10 + DUMP_LIMIT) == []
    assert (play.state.phase, play.state.until) == (Phase.RUNNING, DEADLINE)


def test_the_deadline_comes_before_a_look() -> None:
    play = Play()
    play.at(DEADLINE - 0.1, StoodStill(), Dumped(0))
    assert play.at(DEADLINE) == [Dump((0, 1))]
    assert play.state.timed_out


def test_a_rank_that_cannot_reply_any_more_is_lost_after_the_grace() -> None:
    play = Play()
    play.at(1, Cut(0))
    assert play.state.phase is Phase.DRAINING
    assert play.at(1 + GRACE) == [Dump((0, 1))]
    assert play.statuses == ["lost", "stopped"]
    assert play.at(4.1, Dumped(1)) == [Kill((0, 1))]


def test_the_end_of_a_rank_that_was_cut_says_more() -> None:
    play = Play()
    play.at(1, Replied(0, "ok"), Cut(0), Cut(1), Exited(1, 3))
    assert play.statuses == ["ok", "died"]


def test_the_servers_end_is_the_end_of_all() -> None:
    play = Play()
    play.at(1, Replied(0, "ok"))
    play.at(2, ServerLost())
    assert play.state.phase is Phase.DONE
    assert play.statuses == ["ok", "lost"]


def test_any_order_of_events_ends_in_time_with_every_rank_accounted_for() -> None:
    for seed in range(500):
        play_randomly(seed)


def play_randomly(seed: int) -> None:
    dice = random.Random(seed)
    count = dice.randint(1, 4)
    play = Play(count)
    kinds = [lambda rank: Replied(rank, dice.choice(["ok", "raised", "skipped"]))]
    kinds += [lambda rank: Exited(rank, dice.choice([0, 1, -9])), Dumped, Unstarted, Cut]
    kinds += [lambda _: StoodStill(), lambda _: Looked(dice.random() < 0.5)]
    now = 0.0
    for _ in itertools.count():
        now += dice.expovariate(0.3)
        rank = dice.randrange(count)
        event = dice.choice(kinds)(rank) if dice.random() < 0.4 else Tick()
        if isinstance(event, Exited) and not play.state.ranks[rank].alive:
            continue
        play.at(now, event)
        if play.state.phase is Phase.DONE:
            break
        assert play.state.until <= DEADLINE + DUMP_LIMIT + REAP_LIMIT + 60, "a phase without an end"
    assert all(rank.status != "running" and not rank.alive for rank in play.state.ranks)
    if "ok" in play.statuses and set(play.statuses) != {"ok"}:
        assert not any(isinstance(action, Release) for action in play.actions)
