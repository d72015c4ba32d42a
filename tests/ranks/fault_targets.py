"""What ranks run in the tests of the fault table. Imported on the ranks only; `rank` -1 means all ranks."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time


def reduce(size=1):
    import torch
    import torch.distributed as dist

    tensor = torch.ones(size)
    dist.all_reduce(tensor)


def struck(context, rank):
    context.observe()
    reduce()
    return rank in (-1, context.rank)


def different(context, rank):
    import torch.distributed as dist

    context.observe()
    dist.barrier()
    if context.rank == rank:
        raise ValueError(f"first, on rank {rank}")
    time.sleep(0.5)
    raise [KeyError, RuntimeError, LookupError, OSError][context.rank % 4](f"later, on rank {context.rank}")


def thread_deadlock(context, rank):
    if struck(context, rank):
        lock = threading.Lock()
        lock.acquire()
        thread = threading.Thread(target=lock.acquire, daemon=True)
        thread.start()
        thread.join()
    reduce()


def huge_reply(context, rank):
    return "x" * (65 << 20) if struck(context, rank) else 1


def memory(context, rank):
    if struck(context, rank):
        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115
        limit = pages * resource.getpagesize() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        import torch

        torch.ones(1 << 30)
    reduce()


def order(context, rank):
    import torch
    import torch.distributed as dist

    context.observe()
    one, parts = torch.ones(2), [torch.ones(2) for _ in range(context.world_size)]
    if context.rank == rank:
        dist.all_gather(parts, one)
        dist.all_reduce(one)
    else:
        dist.all_reduce(one)
        dist.all_gather(parts, one)
    dist.barrier()


def shapes(context, rank):
    context.observe()
    reduce(1000 if context.rank == rank else 1)


def store_dropped(context, rank):
    if struck(context, rank):
        port = context.store.underlying_store.port
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            try:
                link = socket.socket(fileno=os.dup(int(name)))
                if link.getpeername()[1] == port:
                    link.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError):
                continue
        context.store.get("what nobody has set")
    reduce()


def full_folder(context, rank):
    if struck(context, rank):
        # /dev/full answers like a file system without any room
        (context.folder / "evidence").symlink_to("/dev/full")
        (context.folder / "evidence").write_text("x" * 100_000)
    reduce()


def fills_folder(context, rank):
    if struck(context, rank):
        (context.folder / "evidence").write_bytes(bytes(4 << 20))
    reduce()


def full_log(context, rank):
    if struck(context, rank):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)
        for _ in range(100):
            sys.stdout.write("x" * 1000 + "\n")
    reduce()


def prints(context, rank, mebibytes):
    if struck(context, rank):
        sys.stdout.write("begin\n")
        for _ in range(mebibytes):
            sys.stdout.write("x" * ((1 << 20) - 1) + "\n")
        sys.stdout.write("end\n")
    reduce()


def deaf(context, rank):
    if struck(context, rank):
        close_channels()
        time.sleep(1000)
    reduce()


def channels():
    """Return copies of the sockets that lead to the parent."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            link = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if link.family == socket.AF_UNIX:
            found.append(link)
    return found


def close_channels():
    for link in channels():
        link.shutdown(socket.SHUT_RDWR)


def reply_lost(context, rank):
    if struck(context, rank):
        close_channels()
    reduce()


def reply_doubled(context, rank):
    if struck(context, rank):
        json_reply(2, value="first")
    reduce()
    return "third"


def reply_of_earlier_job(context, rank):
    if struck(context, rank):
        json_reply(1, job="0123456789ab")
    reduce()
    return "own"


def json_reply(count, **changes):
    """Send a reply like the rank's own; the job's identity is the prefix of the store."""
    import inspect
    import json

    own = next(frame.frame.f_locals["reporter"] for frame in inspect.stack() if "reporter" in frame.frame.f_locals)
    times = {"at": time.monotonic(), "seconds": 0.1, "ready": 0.1}
    reply = {**own.tag, **times, "status": "ok", "value": None, "observations": 1, **changes}
    for _ in range(count):
        own.channel.sendall(json.dumps(reply).encode() + b"\n")


def reply_late(context, rank):
    if struck(context, rank):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the harness waits for the stack a little longer
        time.sleep(context.seconds_left + 0.3)


def flood(context, rank):
    if struck(context, rank):
        for link in channels():
            link.sendall(b"x" * (65 << 20))
    reduce()


def shared_memory(context, rank):
    """Fill a /dev/shm of 1 MiB, which only this rank sees."""
    if struck(context, rank):
        small_mount("/dev/shm")
        import torch

        torch.ones(1 << 20).share_memory_()
    reduce()


def small_mount(path, options="size=1m"):
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x00020000, 1 << 18, 1 << 14
    for done in (
        libc.unshare(new_mounts),
        libc.mount(b"none", b"/", None, private | recursive, None),
        libc.mount(b"none", path.encode(), b"tmpfs", 0, options.encode()),
    ):
        if done:
            raise OSError(ctypes.get_errno(), f"mounting {path}: {os.strerror(ctypes.get_errno())}")


def skip(context, rank):
    import unittest

    if struck(context, rank):
        raise unittest.SkipTest("no such thing here")


def groups(context, rank):
    """Groups that are used in another order on one rank."""
    import torch
    import torch.distributed as dist

    context.observe()
    both = [dist.new_group(), dist.new_group()]
    if context.rank == rank:
        both.reverse()
    for group in both:
        dist.all_reduce(torch.ones(1), group=group)


def returns_early(context, rank):
    """All but one rank wait for one that has returned."""
    if not struck(context, rank):
        reduce()


def comes_late(context, rank, how, seconds):
    """One rank comes to a collective late, while the others wait in it."""
    if struck(context, rank):
        end = time.monotonic() + seconds
        if how == "sleeps":
            time.sleep(seconds)
        while time.monotonic() < end:
            pass
    reduce()
    return "all came"


def times_out(context, rank):
    """The others wait for the timeout of a group, and are content with it."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    context.observe()
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    if rank == context.rank:
        return "absent"
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        return "timeout"
    return "no timeout"


def pollutes(context, rank, fails):
    import torch

    context.observe()
    os.environ["LEAK"] = "1"
    os.chdir("/")
    sys.path.insert(0, "/leak")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch._C._set_deterministic_algorithms(True)  # the public function imports for seconds
    torch.set_num_threads(2)
    torch.manual_seed(99)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    torch.distributed.new_group([context.rank], use_local_synchronization=True)
    torch.__dict__["leak"] = bytearray(64 << 20)
    if fails and rank in (-1, context.rank):
        raise RuntimeError("polluted")


def state(context):
    import torch

    context.observe()
    return [
        os.environ.get("LEAK"),
        os.getcwd(),  # noqa: PTH109
        "/leak" in sys.path,
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.initial_seed(),
        threading.active_count(),
        len(torch.distributed.distributed_c10d._world.pg_map),
        "leak" in vars(torch),
    ]


def kills_parent(context, pid, number, folder):
    (context.folder / "begun").write_text("x")
    with open(f"{folder}/pid{context.rank}", "w") as file:  # noqa: PTH123
        file.write(str(os.getpid()))
    context.observe()
    reduce()
    if context.rank == 0:
        os.kill(pid, number)
    time.sleep(1000)
