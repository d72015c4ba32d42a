"""What ranks run in these tests. Imported on the ranks only."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path


def reduce(context, size=1):
    import torch
    import torch.distributed as dist

    tensor = torch.full((size,), float(context.rank + 1))
    dist.all_reduce(tensor)
    return tensor.tolist()


def good(context, extra=None):
    context.observe(2)
    sys.stdout.write(f"hello from {context.rank}\n")
    total = reduce(context)
    (context.folder / f"file{context.rank}").write_text("x")
    return {"total": total, "extra": extra, "rank": context.rank}


def describe(context):
    import torch

    context.observe()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "FROM_JOB", "FROM_PARENT")
    return {
        "env": {name: os.environ.get(name) for name in names},
        "cwd": str(Path.cwd()),
        "threads": torch.get_num_threads(),
        "policies": sorted({os.sched_getscheduler(int(task.name)) for task in Path("/proc/self/task").iterdir()}),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "left": context.seconds_left,
        "world_size": context.world_size,
        "store": context.store is not None,
        "device": context.device,
        "modules": sorted(name for name in sys.modules if name in ("pytest", "torch", "torch.distributed.fsdp")),
        "pid": os.getpid(),
    }


def regroup(context, sizes, slow=None):
    """Sum over ever smaller groups; ``slow`` is the rank that comes late to each change."""
    context.observe()
    found, worlds = [], []
    for size in sizes:
        if context.rank == slow:
            time.sleep(0.3)
        smaller = context.regroup(size)
        if smaller is None:
            break
        context = smaller
        found.append(reduce(context))
        worlds.append([context.world_size, os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]])
    return {"found": found, "worlds": worlds, "pid": os.getpid()}


def regroup_refused(context, size):
    context.observe()
    try:
        context.regroup(size)
    except ValueError as error:
        return str(error)
    return ""


def regroup_too_early(context):
    """Rank 0 has one collective more than the others, which go on to leave the group."""
    context.observe()
    if context.rank == 0:
        reduce(context)
    context.regroup(1)
    return {}


def regroup_and_fail(context, how):
    """Rank 2 leaves the group, rank 0 fails in the smaller one."""
    smaller = context.regroup(2)
    context.observe()
    if context.rank == 0:
        if how == "raise":
            raise RuntimeError("in the smaller group")
        time.sleep(60)
    if smaller is not None:
        reduce(smaller)
    return {}


def plain(context):
    context.observe()
    return {"world_size": context.world_size, "store": context.store is not None, "torch": "torch" in sys.modules}


def stores(context):
    context.observe()
    context.store.set(f"from{context.rank}", str(context.rank))
    other = 1 - context.rank
    return int(context.store.get(f"from{other}"))


# --- exceptions -----------------------------------------------------------------------------------------------


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


class SilentError(Exception):
    def __str__(self):
        raise RuntimeError("no text for you")


class EvilError(BaseException):
    def __str__(self):
        raise SystemExit(0)

    __repr__ = __str__


def raises(context, rank, when="before", kind="value"):
    context.observe()
    if when == "after":
        reduce(context)
    if rank in (-1, context.rank):
        if when == "inside":
            import torch
            import torch.distributed as dist

            dist.all_reduce(torch.ones(1), op="no such op")
        raise {
            "value": ValueError("boom"),
            "unpicklable": UnpicklableError(1, 2),
            "silent": SilentError(),
            "evil": EvilError(),
            "exit": SystemExit(0),
            "interrupt": KeyboardInterrupt(),
            "long": ValueError("x" * 3_000_000),
            "surrogate": ValueError("bad \udcff text"),
        }[kind]
    reduce(context)


def all_raise(context):
    reduce(context)  # connected: who still connects when another one fails waits for it instead
    raise ValueError(f"same on rank {context.rank}")


# --- ends ------------------------------------------------------------------------------------------------------


def ends(context, rank, how):
    context.observe()
    reduce(context)
    if rank in (-1, context.rank):
        sys.stderr.write("last words\n")
        if how == "null":
            ctypes.string_at(0)
        elif how == "terminate":
            os.write(2, b"terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  bad shape\n")
            os.abort()
        elif isinstance(how, int):
            os._exit(how)
        os.kill(os.getpid(), getattr(signal, how))
    reduce(context)


def shapes(context):
    context.observe()
    return len(reduce(context, size=1 + 1000 * context.rank))


def aborts_after_success(context, rank):
    context.observe()
    if rank in (-1, context.rank):
        import torch.distributed as dist

        dist.destroy_process_group = os.abort


def hangs_after_success(context, rank):
    context.observe()
    if context.rank == rank:
        import torch.distributed as dist

        dist.destroy_process_group = lambda: time.sleep(1000)


# --- hangs -----------------------------------------------------------------------------------------------------


def hangs(context, rank, how):
    context.observe()
    reduce(context)
    if rank in (-1, context.rank):
        if how == "sleep":
            time.sleep(1000)
        elif how == "loop":
            while True:
                pass
        elif how == "returns":
            return
        elif how == "gil":
            while True:
                ctypes.PyDLL(None).usleep(ctypes.c_uint(600_000_000))  # holds the GIL
        elif how == "deaf":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(1)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
    reduce(context)


def mismatched(context):
    import torch
    import torch.distributed as dist

    context.observe()
    if context.rank == 0:
        dist.all_reduce(torch.ones(2))
    else:
        dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(2))
        dist.barrier()


# --- skips and replies -----------------------------------------------------------------------------------------


def skips(context, ranks, with_pytest=False):
    context.observe()
    if context.rank in ranks:
        if with_pytest:
            import pytest

            pytest.skip("no such thing here")
        raise unittest.SkipTest("no such thing here")
    reduce(context)


def observes(context, counts):
    context.observe(counts[context.rank])


def returns(context, what):
    context.observe()
    return {"set": {1}, "big": "x" * 2_000_000, "nan": float("nan"), "bytes": b"x"}[what]


def answers_twice(context):
    context.observe()
    if os.fork() == 0:
        return "child"
    os.wait()
    return "parent"


def forges(context, **tag):
    import json
    import socket

    context.observe()
    reduce(context)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            channel = socket.socket(fileno=os.dup(int(name)))
            if channel.family != socket.AF_UNIX:
                continue
        except OSError:
            continue
        for text in ("rubbish", "[1]", json.dumps({"status": "ok", "value": "forged", **tag})):
            channel.sendall(text.encode() + b"\n")
    return "true"


def floods(context):
    import socket

    context.observe()
    own = [socket.socket(fileno=os.dup(int(name))) for name in os.listdir("/proc/self/fd") if is_socket(name)]  # noqa: PTH208
    while True:
        for channel in own:
            if channel.family == socket.AF_UNIX:
                channel.sendall(b"rubbish\n" * 1000)


def is_socket(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}").startswith("socket")  # noqa: PTH115
    except OSError:
        return False


def closes_everything(context):
    context.observe()
    os.closerange(3, 1000)


def starts_children(context):
    context.observe()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    return child.pid


def waits(context, folder):
    (Path(folder) / f"pid{context.rank}").write_text(str(os.getpid()))
    context.observe()
    if context.rank == 0:
        ctypes.PyDLL(None).usleep(ctypes.c_uint(600_000_000))
    reduce(context)


def fails_beside_a_loop(context, rank):
    context.observe()
    reduce(context)
    if context.rank == rank:
        raise ValueError("boom")
    while True:
        time.sleep(0.1)
