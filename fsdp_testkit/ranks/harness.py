"""The harness: owns the rank server, the store and the folder, and runs one job after the other."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks import gpus as gpu_names
from fsdp_testkit.ranks import load, recorder
from fsdp_testkit.ranks.folders import OwnFolder, remove_orphans
from fsdp_testkit.ranks.hosts import Hosts
from fsdp_testkit.ranks.hosts_link import HostsLink
from fsdp_testkit.ranks.job import MAX_DEADLINE, Job, JobReport
from fsdp_testkit.ranks.link import Link, ServerLink, Store
from fsdp_testkit.ranks.run import Run
from fsdp_testkit.ranks.slots import Lease, Slots
from fsdp_testkit.ranks.spec import DETAIL
from fsdp_testkit.ranks.verdict import explain

#: What the rank server imports once, so that ranks do not have to. A module that is missing is noted.
DEFAULT_PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor",
    "torch.optim",
)
#: Jobs that meet at one store. Their keys stay in it, in this process; a new store gives the memory back.
STORE_JOBS = 100
#: What to do about errors of the file system that are the machine's and not a job's.
_ADVICE = {
    errno.ENOSPC: "free some room there, or set TMPDIR to another folder",
    errno.EDQUOT: "free some of your quota, or set TMPDIR to another folder",
    errno.EROFS: "set TMPDIR to a folder that can be written to",
    errno.EACCES: "set TMPDIR to a folder that can be written to",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "close some of the files that are open on this machine",
}


class Harness:
    """Runs jobs, one after the other, each in fresh processes.

    Args:
        folder: where job folders are made; a temporary folder that `close` deletes where ``None``.
        start_method: ``forkserver`` forks CPU ranks from a server with ``preload`` imported; ``spawn`` starts
            a fresh interpreter for each rank. CUDA ranks are always spawned.
        preload: names of modules.
        grace: seconds that the other ranks get after the first failure.
        slots: where each job first waits for as many slots as it has processes, and for GPUs of its own where it
            runs on them; its deadline starts after that.
        scale_deadlines: multiply deadlines on a loaded machine, by at most 5; see `load`.
        hosts: agents that start the ranks, on other machines or on this one; ``None`` starts them here.

    Attributes:
        folder: where job folders are made.
        env: environment variables of what starts the ranks and of all ranks; to be filled before the first job.

    Raises:
        UsageError: a bad argument.
        EnvironmentLacksError: there is no room for the folder.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        start_method: str = "forkserver",
        preload: Sequence[str] = DEFAULT_PRELOAD,
        grace: float = 3.0,
        slots: Slots | None = None,
        scale_deadlines: bool = False,
        hosts: Hosts | None = None,
    ) -> None:
        if start_method not in ("forkserver", "spawn"):
            raise UsageError(f"start_method={start_method!r} must be 'forkserver' or 'spawn'")
        if isinstance(preload, str) or not all(isinstance(name, str) for name in preload):
            raise UsageError(f"preload={preload!r} must be a sequence of module names")
        if not 0 <= grace <= 60:
            raise UsageError(f"grace={grace!r} must be seconds in [0, 60]")
        self.start_method = start_method
        self.preload = tuple(preload)
        self.grace = grace
        self.slots = slots
        self.scale_deadlines = scale_deadlines
        self.hosts = hosts
        self.env: dict[str, str] = {}
        self._cost: tuple[float, float | None] | None = None
        try:
            if folder is None:
                remove_orphans(Path(tempfile.gettempdir()))
            else:
                folder.mkdir(parents=True, exist_ok=True)
            self._own = OwnFolder(folder)
        except OSError as error:
            raise _no_room(folder or tempfile.gettempdir(), error) from None
        self.folder = self._own.path
        self._keeps_jobs = folder is not None
        self._links: dict[str, Link] = {}
        self._store: Store | None = None
        self._store_jobs = 0
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False
        atexit.register(self.close)

    def run(self, job: Job, *, explain_hangs: bool = True) -> JobReport:
        """Run ``job`` and wait for its end: at most its deadline and 5 s, plus the second run of a hang.

        Args:
            job: what to run.
            explain_hangs: run a hung job once more, with its collectives recorded, and attach to the failure
                which of them do not match.

        Raises:
            UsageError: the harness is closed, or belongs to another process.
            EnvironmentLacksError: the rank server cannot be started, or there is no room for the job's folder.
        """
        if self._closed or os.getpid() != self._owner:
            raise UsageError("the harness is closed, or belongs to another process")
        with self._lock:
            identity = uuid.uuid4().hex[:12]
            report = self._run(job, identity, 0)
            hung = report.failure is not None and report.failure.kind == "hang"
            if hung and explain_hangs and job.comm in ("gloo", "nccl") and job.processes > 1:
                assert report.failure is not None
                try:
                    report.failure.explanation = self._explain(job, identity, report)
                except EnvironmentLacksError as error:  # what took the ranks away is still there
                    report.failure.explanation = f"it could not be run again: {error}"
                except BaseException:
                    report.discard()
                    raise
            return report

    def _explain(self, job: Job, identity: str, report: JobReport) -> str:
        """Say which collectives of a job that hung do not match."""
        if said := recorder.mismatch(recorder.read(report.folder / "logs", job.processes)):
            return said  # NCCL's are always recorded
        # what the recorder dumps stays on a host, and only here can it be read
        recorded = recorder.available() and self.hosts is None
        env = job.env if recorded else {**job.env, **DETAIL}
        # It came to this point once; it need not wait as long as the deadline to come there again.
        stall = max(job.stall, 4 * recorder.PERIOD)  # the last collective has to be on record by then
        deadline = min(job.deadline, max(2 * stall, 3 * report.seconds))
        second = self._run(replace(job, env=env, deadline=deadline, stall=min(stall, MAX_DEADLINE)), identity, 1)
        said = ""
        if second.failure is not None and second.failure.kind == "hang":
            places = {reply.rank: reply.error for reply in second.replies if reply.collective}
            said = recorder.mismatch(recorder.read(second.folder / "logs", job.processes), places)
        second.discard()
        how = "its collectives recorded" if recorded else "TORCH_DISTRIBUTED_DEBUG=DETAIL"
        return f"run again with {how}: {said or explain(second.replies, second.failure)}"

    def warm(self, target: str, args: dict[str, Any], *, limit: float = 60.0) -> str:
        """Run ``package.module:function(**args)`` once where CPU ranks are forked from, before the next job.

        What it imports and caches is then there in every new rank. Use it for work that all ranks would
        repeat; it must not leave threads or a process group behind. Does nothing with ``spawn``.

        Args:
            target: function to call.
            args: JSON data.
            limit: seconds after which the server is replaced by a fresh, cold one.

        Returns:
            ``""``, or what went wrong; jobs run all the same, only slower.

        Raises:
            EnvironmentLacksError: the rank server cannot be started.
        """
        if self.start_method != "forkserver":
            return ""
        with self._lock:
            link = self._ready(Job(target=target))
            problem = link.warm(target, args, limit)
            if problem is None:
                self._drop_links(at_once=True)
                return f"warming with {target} did not end within {limit:g} s"
            return problem

    def _run(self, job: Job, identity: str, attempt: int) -> JobReport:
        self._ready(job)
        gpus = job.processes if job.device == "cuda" and self.hosts is None else 0  # hosts have GPUs of their own
        with nullcontext(Lease()) if self.slots is None else self.slots.lease(job.processes, gpus) as lease:
            if lease.gpus:
                job = replace(job, env={gpu_names.VARIABLE: ",".join(lease.gpus), **job.env})
            if self.scale_deadlines and attempt == 0:
                self._measure()
            scale, seconds = 1.0, None
            if self.scale_deadlines and self._cost is not None:
                seconds = self._cost[1]
                scale = load.factor(seconds)
            # a measurement that took the server with it has put another in its place
            link = self._ready(job)
            store = self._meet(job, link)
            scaled = replace(job, deadline=min(MAX_DEADLINE, job.deadline * scale))
            report = self._attempt(scaled, identity, attempt, link, store)
        if lease.problem:
            report.notes.append(lease.problem)
        if scale > 1 and report.failure is not None and report.failure.kind == "hang":
            report.failure.text = f"{load.remark(job.deadline, scale, seconds)}\n\n{report.failure.text}"
        return report

    def _ready(self, job: Job) -> Link:
        link = self._link(job)
        try:
            if link.wait_ready():
                self._store = None  # it may have been held by an agent's session that is gone
        except BaseException:
            self._drop_links(at_once=True)  # what is not ready has nothing to take leave of
            raise
        return link

    def _meet(self, job: Job, link: Link) -> Store | None:
        if job.comm not in ("gloo", "nccl") and job.processes == 1:
            return None
        if self._store is None or self._store_jobs >= STORE_JOBS:
            self._store = None  # the old one ends before the new one begins
            try:
                self._store, self._store_jobs = link.open_store(), 0
            except BaseException:
                self._drop_links()
                raise
        self._store_jobs += 1
        return self._store

    def _measure(self) -> None:
        now = time.monotonic()
        if self._cost is not None and now - self._cost[0] < load.VALID:
            return
        job = Job(target=load.TARGET, comm="none", deadline=load.LIMIT)
        report = self._attempt(job, uuid.uuid4().hex[:12], 0, self._link(job), None)
        value = report.replies[0].value
        self._cost = (now, float(value) if isinstance(value, float) else None)
        report.discard()

    def _attempt(self, job: Job, identity: str, attempt: int, link: Link, store: Store | None) -> JobReport:
        folder = self.folder / f"{identity}-{attempt}"
        job = replace(job, env={**self.env, **job.env})
        run = Run(job, identity, attempt, folder, link, store)
        try:
            report = run.execute(self.grace)
        except OSError as error:  # files, folders, sockets: processes are started elsewhere
            self._drop_links()
            shutil.rmtree(folder, ignore_errors=True)
            raise _no_room(folder, error) from None
        except UsageError:  # before anything was started
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:  # Ctrl-C above all: nothing may be left behind, whatever interrupted the wait
            self._drop_links()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            run.close()
        if run.server_lost:
            self._drop_links(at_once=True)
        return report

    def _link(self, job: Job) -> Link:
        method = "fork" if self.start_method == "forkserver" and job.device == "cpu" else "spawn"
        if method not in self._links:
            preload = self.preload if method == "fork" else ()
            owned = "" if self._keeps_jobs else str(self.folder)
            self._links[method] = (
                ServerLink(method, preload, self.folder / f"server-{method}.log", owned, env={**os.environ, **self.env})
                if self.hosts is None
                else HostsLink(self.hosts, method, preload, self.folder, self.env)
            )
        return self._links[method]

    def _drop_links(self, *, at_once: bool = False) -> None:
        self._store = None  # it may have been held by one of them
        while self._links:
            self._links.popitem()[1].close(at_once=at_once)

    def close(self) -> None:
        """End all processes and delete what the harness made; job folders under a given ``folder`` stay."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._drop_links()
        if self._keeps_jobs:
            for log in self.folder.glob("server-*.log"):
                log.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._own.release()

    def __enter__(self) -> Harness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _no_room(folder: Path | str, error: OSError) -> EnvironmentLacksError | OSError:
    if error.errno not in _ADVICE:
        return error
    return EnvironmentLacksError(f"jobs cannot have their files in {folder}: {error.strerror}; {_ADVICE[error.errno]}")
