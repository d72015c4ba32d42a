"""The rank server: a small process that starts ranks, reaps them, and ends them when it or the parent dies.

It is single-threaded and never runs a target itself. With ``fork`` it has the heavy modules imported, so that
a rank is ready in hundredths of a second and shares their memory; with ``spawn`` it imports nothing and starts
a fresh interpreter for each rank. Why not the forkserver of ``multiprocessing``: that one is a singleton of the
whole parent process, runs the parent's script again in every rank, keeps the environment of its first use and
leaves its processes behind until the parent ends.

Messages are JSON datagrams on a Unix socket that only the parent and the server hold:

- parent: ``{"start": rank}`` with the files [channel, spec, log], ``{"signal": number, "pid": pid}``,
  ``{"warm": target, "args": {...}}``, ``{"bye": true}``;
- server: ``{"started": rank, "pid": pid}``, ``{"unstarted": rank, "error": text}``,
  ``{"ended": pid, "code": status}``, ``{"warmed": problem}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MESSAGE_LIMIT = 65536
#: Exit status of a rank that cannot go on for a reason that is not its target's.
UNFIT = 70
#: Seconds between looks at whether the parent is still there, for the case that its end of the socket leaked.
PARENT_POLL = 2.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
#: What a fresh interpreter runs to become a rank: (rank, channel, spec) follow as arguments.
_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from fsdp_testkit.ranks.rank import main
main(%s)"""


def main(control: int, method: str, preload: Iterable[str], folder: str) -> None:
    """Serve until the parent closes its end of the socket.

    Args:
        control: file descriptor of the server's end.
        method: ``fork`` or ``spawn``.
        preload: modules to import first; failures are reported, not fatal.
        folder: deleted should the parent end without a farewell; ``""`` deletes nothing.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited from the thread that started the server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    # A native crash of a rank must not leave a core file in the user's folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    parent = os.getppid()
    if method == "fork":
        preload = ("fsdp_testkit.ranks.rank", *preload)
    problems = _preload(preload)
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if method == "fork" and threads > 1:
        problems.append(f"preloaded modules left {threads} threads in the rank server; forking may deadlock")
    if method == "fork":
        gc.collect()
        gc.freeze()  # the collector would otherwise touch, and so copy, the shared pages
    with socket.socket(fileno=control) as link:
        server = _Server(link, method)
        try:
            server.send({"ready": os.getpid(), "problems": problems})
            server.serve(parent)
        finally:
            server.end_all()
            if folder and not server.dismissed:
                shutil.rmtree(folder, ignore_errors=True)


def _preload(names: Iterable[str]) -> list[str]:
    problems = []
    gc.disable()  # modules make millions of objects that stay: to look through them again and again takes a fifth
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever a module does at import, the server has to come up
            problems.append(f"preloading {name} failed: {type(error).__name__}: {error}"[:500])
    gc.enable()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return problems[:50]  # a message is limited


class _Server:
    def __init__(self, link: socket.socket, method: str) -> None:
        self.link = link
        self.method = method
        self.pids: set[int] = set()
        self.dismissed = False
        self.wake, self.waker = os.pipe()
        os.set_blocking(self.waker, False)
        os.set_blocking(self.wake, False)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def send(self, message: dict[str, Any]) -> None:
        self.link.send(json.dumps(message).encode())

    def serve(self, parent: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.link, selectors.EVENT_READ)
            selector.register(self.wake, selectors.EVENT_READ)
            while True:
                ready = selector.select(PARENT_POLL)
                self.reap()
                if os.getppid() != parent:
                    return
                if any(key.fileobj is self.link for key, _ in ready) and not self.receive(selector):
                    return

    def receive(self, selector: selectors.BaseSelector) -> bool:
        data, files, _, _ = socket.recv_fds(self.link, MESSAGE_LIMIT, 3)
        if not data:
            return False
        message = json.loads(data)
        if "bye" in message:
            self.dismissed = True
            return False
        if "warm" in message:
            self.warm(message["warm"], message["args"])
        elif "start" in message:
            try:
                self.start(message, files, selector)
            finally:
                for file in files:
                    os.close(file)
        elif message["pid"] in self.pids:  # not yet reaped, so the number cannot belong to anybody else
            _signal(message["pid"], message["signal"])
        return True

    def warm(self, target: str, args: dict[str, Any]) -> None:
        """Run a function here, for what it leaves in memory: ranks forked from now on inherit it."""
        problem = ""
        try:
            module, _, name = target.partition(":")
            getattr(importlib.import_module(module), name)(**args)
        except BaseException as error:  # the ranks will meet the same problem and report it properly
            problem = f"warming with {target} failed: {type(error).__name__}: {error}"[:500]
        gc.collect()
        gc.freeze()
        self.send({"warmed": problem})

    def start(self, message: dict[str, Any], files: list[int], selector: selectors.BaseSelector) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self.send({"unstarted": message["start"], "error": f"fork failed: {error}"})
            return
        if pid == 0:
            try:
                channel, spec, log = files
                _become_rank(server, log)
                selector.close()
                self.link.close()
                os.close(self.wake)
                os.close(self.waker)
                self.enter(message["start"], channel, spec)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(UNFIT)  # a rank never comes back into the server's loop
        self.pids.add(pid)
        self.send({"started": message["start"], "pid": pid})

    def enter(self, rank: int, channel: int, spec: int) -> None:
        if self.method == "fork":
            sys.modules["fsdp_testkit.ranks.rank"].main(rank, channel, spec)
        raw = json.loads(os.pread(spec, os.fstat(spec).st_size, 0))
        for file in (channel, spec):
            os.set_inheritable(file, True)
        boot = _BOOT % f"{rank}, {channel}, {spec}"
        os.execve(sys.executable, [sys.executable, "-u", "-c", boot, json.dumps(raw["path"])], raw["env"])

    def reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake, 4096):
                pass
        for pid in list(self.pids):
            # Look without reaping: while the zombie holds the number, its whole group can be killed safely.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _signal(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            self.pids.discard(pid)
            self.send({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def end_all(self) -> None:
        for pid in self.pids:
            _signal(pid, signal.SIGKILL)
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _become_rank(server: int, log: int) -> None:
    # A group of its own: what the rank starts is ended with it.
    os.setpgid(0, 0)
    # The server has one thread, so this means: when the server ends the kernel kills the rank, even one that is
    # stuck in C code or stopped.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(UNFIT)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asked for its stack before it can give one: no reason to die
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _signal(pid: int, number: int) -> None:
    # SIGUSR1 asks one process for its stack and would kill its children; the rest is for all that it started.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGUSR1:
            os.kill(pid, number)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            os.kill(pid, number)
