"""Procedures side by side: who runs when, what is asked once, how errors and interrupts travel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fsdp_testkit.engine.together import Request, Together


class Log:
    """Runs requests: the result is the key in capitals; remembers the batches."""

    def __init__(self, fail: Callable[[str], None] = lambda _: None) -> None:
        self.batches: list[list[str]] = []
        self.fail = fail
        self.together = Together(self.choose, self.run)

    def choose(self, requests: Sequence[Request]) -> list[Request]:
        first = min(request.key[0] for request in requests)
        return [request for request in requests if request.key[0] == first]

    def run(self, requests: list[Request]) -> None:
        self.batches.append([request.key for request in requests])
        for request in requests:
            try:
                self.fail(request.key)
            except ValueError as error:
                request.error = error
            request.result = request.key.upper()
            request.seconds = 2.0


def asks(log: Log, *keys: str) -> Callable[[], list[Any]]:
    return lambda: [log.together.ask(key, None) for key in keys]


def test_what_fits_together_is_run_together_in_order() -> None:
    log = Log()
    ended = log.together.all([asks(log, "a1", "b1"), asks(log, "a2", "c1"), asks(log, "b2"), list])
    assert [end.value for end in ended] == [["A1", "B1"], ["A2", "C1"], ["B2"], []]
    assert log.batches == [["a1", "a2"], ["b2", "b1"], ["c1"]]


def test_an_equal_key_is_one_job_whose_time_is_shared() -> None:
    log = Log()
    ended = log.together.all([asks(log, "a1"), asks(log, "a1")])
    assert log.batches == [["a1"]]
    assert [end.value for end in ended] == [["A1"], ["A1"]]
    assert all(1.0 <= end.seconds < 2.0 for end in ended)


def test_what_is_started_beside_is_in_the_same_batch_and_its_time_is_its_owners() -> None:
    log = Log()
    outcomes = []

    def beside() -> None:
        outcomes.append(log.together.ask("a1", None))
        log.together.beside(lambda: outcomes.append(log.together.ask("b1", None)))
        raise LookupError("of its own")

    def owner() -> str:
        log.together.beside(beside)
        return str(log.together.ask("a2", None))

    other, mine = log.together.all([asks(log, "a3"), owner])
    assert log.batches == [["a3", "a2", "a1"], ["b1"]]
    assert (mine.value, mine.error, outcomes) == ("A2", None, ["A1", "B1"])
    assert 6.0 <= mine.seconds < 7.0
    assert 2.0 <= other.seconds < 3.0
    log.together.beside(lambda: outcomes.append("outside"))
    assert log.together.all([list])[0].value == []
    assert outcomes == ["A1", "B1"]


def test_several_jobs_are_asked_for_at_once() -> None:
    log = Log()

    def procedure() -> list[Any]:
        return log.together.ask_all([("b1", None), ("a1", None), ("a2", None)])

    ended = log.together.all([procedure, asks(log, "a1", "c1")])
    assert [end.value for end in ended] == [["B1", "A1", "A2"], ["A1", "C1"]]
    assert log.batches == [["a1", "a2"], ["b1"], ["c1"]]
    # of a1, which both have asked for, each has a half
    assert [int(end.seconds) for end in ended] == [5, 3]


def test_of_several_jobs_the_first_error_counts_and_all_are_run() -> None:
    def fail(key: str) -> None:
        if key in ("a1", "b2"):
            raise ValueError(f"no {key}")

    log = Log(fail)
    (ended,) = log.together.all([lambda: log.together.ask_all([(key, None) for key in ("b1", "b2", "a1", "c1")])])
    assert str(ended.error) == "no b2"
    assert log.batches == [["a1"], ["b1", "b2"], ["c1"]]


def test_errors_stay_with_the_procedures_that_asked() -> None:
    def fail(key: str) -> None:
        if key == "a1":
            raise ValueError("no a1")

    log = Log(fail)

    def breaks() -> list[Any]:
        raise LookupError("of its own")

    ended = log.together.all([asks(log, "a1"), asks(log, "a2"), breaks])
    assert isinstance(ended[0].error, ValueError)
    assert ended[1].value == ["A2"]
    assert isinstance(ended[2].error, LookupError)


def test_an_interrupt_ends_every_procedure_and_its_thread() -> None:
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    log = Log(fail)
    cleaned = []

    def tidies() -> list[Any]:
        log.together.beside(asks(log, "a2", "a3"))
        try:
            return asks(log, "a1")()
        finally:
            cleaned.append("yes")
            log.together.beside(lambda: cleaned.append("beside"))
            asks(log, "a2")()  # what is being ended cannot ask for more

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        log.together.all([tidies, asks(log, "b1")])
    assert cleaned == ["yes"]
    assert threading.active_count() == before
    # and it can be used again
    log.fail = lambda _: None
    assert log.together.all([asks(log, "a3")])[0].value == ["A3"]
    assert cleaned == ["yes"]


def test_one_procedure_runs_at_a_time() -> None:
    log = Log()
    inside: list[int] = []
    most = []

    def procedure() -> list[Any]:
        for key in ("a1", "b1", "c1"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            log.together.ask(key, None)
        return []

    log.together.all([procedure] * 8)
    assert max(most) == 1
    assert not log.together.inside
