"""Procedures that wait for jobs at the same time, so that their jobs can share ranks.

Each procedure is a plain function in a thread of its own, but only one of them runs at a time: a procedure
that asks for a job stands still until it is there. When all stand still, those jobs that fit together are run
in one go, by the thread that everything was started from, since Ctrl-C arrives there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class AbandonedError(BaseException):
    """Raised in a procedure that waits while everything is being ended; nothing should catch it."""


@dataclass(slots=True, eq=False)
class Request:
    """A job that procedures wait for.

    Attributes:
        key: equal keys ask for the same job.
        payload: what the runner needs.
        result: set by the runner.
        error: raised in the procedures instead, where set.
        seconds: what the job took.
        owners: procedures that have asked; they share its time.
        askers: those of them that wait.
        done: whether it was run.
    """

    key: Any
    payload: Any
    result: Any = None
    error: BaseException | None = None
    seconds: float = 0.0
    owners: list[_Task[Any]] = field(default_factory=list)
    askers: list[_Task[Any]] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True, eq=False)
class Ended(Generic[T]):
    """How a procedure ended: with a value or an exception; ``seconds`` with its share of the jobs."""

    value: T | None = None
    error: BaseException | None = None
    seconds: float = 0.0


class _Task(Generic[T]):
    def __init__(self, together: Together, function: Callable[[], T], owner: _Task[Any] | None = None) -> None:
        self.ended: Ended[T] = Ended()
        #: Where its time is counted.
        self.account: Ended[Any] = self.ended if owner is None else owner.account
        self.done = False
        self.abandoned = False
        self._function = function
        self._together = together
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name="procedure", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it run until it waits for a job or ends."""
        started = time.monotonic()
        self._go.release()
        self._stands.acquire()
        self.account.seconds += time.monotonic() - started
        if self.done:
            self._thread.join()

    def wait(self, request: Request) -> Any:
        """Stand still until the request's job is there. Called by the task's own thread."""
        if not request.done:
            request.askers.append(self)
            self._stands.release()
            self._go.acquire()
        if self.abandoned:
            raise AbandonedError
        if request.error is not None:
            raise request.error
        return request.result

    def _main(self) -> None:
        self._together.local.task = self
        self._go.acquire()
        try:
            if not self.abandoned:
                self.ended.value = self._function()
        except BaseException as error:  # handed over to whoever asked for the procedure
            self.ended.error = error
        finally:
            self.done = True
            self._stands.release()


class Together:
    """Runs procedures side by side and their jobs in batches.

    Args:
        choose: from the jobs that are waited for, those to be run next.
        run: runs them: sets ``result`` or ``error`` of each, and ``seconds``.
    """

    def __init__(
        self, choose: Callable[[Sequence[Request]], list[Request]], run: Callable[[list[Request]], None]
    ) -> None:
        self.local = threading.local()
        self._choose = choose
        self._run = run
        self._pending: list[Request] = []
        self._tasks: list[_Task[Any]] = []
        self._ready: list[_Task[Any]] = []

    @property
    def inside(self) -> bool:
        """Whether the caller is one of the procedures."""
        return getattr(self.local, "task", None) is not None

    def ask(self, key: Any, payload: Any) -> Any:
        """Wait for a job, called by a procedure; return its result.

        Raises:
            Exception: what the runner set as the job's error.
        """
        return self.ask_all([(key, payload)])[0]

    def ask_all(self, wanted: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Wait for several jobs, pairs of key and payload, that need nothing of each other; return their results.

        Raises:
            Exception: what the runner set as the error of the first that has one.
        """
        task: _Task[Any] = self.local.task
        if task.abandoned:
            raise AbandonedError
        requests = [self._request(key, payload) for key, payload in wanted]
        for request in requests:
            request.owners.append(task)
        return [task.wait(request) for request in requests]

    def _request(self, key: Any, payload: Any) -> Request:
        for request in self._pending:
            if request.key == key:
                return request
        self._pending.append(Request(key, payload))
        return self._pending[-1]

    def beside(self, function: Callable[[], object]) -> None:
        """Run ``function`` as a procedure beside the one that calls, to ask early for what is needed later.

        Its outcome is dropped: whoever needs the job asks for it again, and gets what came of it. Its time is the
        caller's. Does nothing outside a procedure, where nothing can be put together.
        """
        if self.inside and not self.local.task.abandoned:
            self._begin(_Task(self, function, owner=self.local.task))

    def all(self, functions: Sequence[Callable[[], T]]) -> list[Ended[T]]:
        """Run the procedures to their ends."""
        tasks = [_Task(self, function) for function in functions]
        for task in tasks:
            self._begin(task)
        try:
            while self._ready or self._pending:
                for ready in self._ready:  # grows by what they start beside
                    ready.go_on()
                self._ready.clear()
                if self._pending:
                    chosen = self._choose(self._pending)
                    self._run(chosen)
                    for request in chosen:
                        self._pending.remove(request)
                        request.done = True
                        for task in request.owners:
                            task.account.seconds += request.seconds / len(request.owners)
                        self._ready.extend(request.askers)
        finally:
            for left in self._tasks:
                if not left.done:  # interrupted: their threads must not outlive this call
                    left.abandoned = True
                    left.go_on()
            self._pending.clear()
            self._tasks.clear()
            self._ready.clear()
        return [task.ended for task in tasks]

    def _begin(self, task: _Task[Any]) -> None:
        self._tasks.append(task)
        self._ready.append(task)
