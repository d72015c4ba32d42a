"""What this machine can do for ranks, and what to change: looked at and tried out in a few seconds."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.ranks.harness import Harness
from fsdp_testkit.ranks.job import Job
from fsdp_testkit.ranks.slots import cores

#: What is enough for four ranks of tiny models: memory, shared memory and temporary files in MiB; files; processes.
MEMORY, SHARED, TEMPORARY, FILES, PROCESSES = 4096, 64, 1024, 1024, 512


@dataclass(frozen=True, slots=True)
class Look:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        found: what it is.
        advice: what to change, ``""`` where it is good.
        fatal: whether ranks cannot run as it is.
    """

    name: str
    found: str
    advice: str = ""
    fatal: bool = False


def examine() -> list[Look]:
    """Look at the machine and run a collective on two ranks."""
    return [_cores(), _memory(), *_folders(), *_limits(), *_group()]


def probe(context: Any) -> dict[str, Any]:
    """Run on each rank: a collective, and what torch says of GPUs."""
    import torch
    import torch.distributed as dist

    context.observe()
    total = torch.tensor([context.rank + 1.0])
    dist.all_reduce(total)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
    return {
        "total": total.item(),
        "nccl": nccl,
        "cuda": torch.version.cuda or "",
        "gpus": torch.cuda.device_count(),
    }


def _cores() -> Look:
    count, load = cores(), os.getloadavg()[0]
    advice = ""
    if count < 2:
        advice = "ranks take turns on a single core: raise --fsdp-deadline"
    elif load > 2 * count:
        advice = "others use this machine: deadlines are scaled, and runs take longer"
    return Look("cores", f"{count} (load {load:.1f})", advice)


def _memory() -> Look:
    free = 0
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) >> 10
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8").strip()
        if limit.isdigit():
            free = min(free, (int(limit) - int(used)) >> 20)
    except OSError:
        pass
    advice = f"less than {MEMORY} MiB: use -n 1, and --fsdp-start-method forkserver" if free < MEMORY else ""
    return Look("memory", f"{free} MiB free", advice)


def _folders() -> list[Look]:
    temporary = tempfile.gettempdir()
    looks = []
    for name, folder, least, advice in (
        ("shared memory", "/dev/shm", SHARED, "start the container with --shm-size=1g or --ipc=host"),
        ("temporary files", temporary, TEMPORARY, "free some room, or set TMPDIR to another folder"),
    ):
        try:
            room = shutil.disk_usage(folder).free >> 20
            looks.append(Look(name, f"{room} MiB free in {folder}", advice if room < least else ""))
        except OSError as error:
            looks.append(Look(name, f"{folder}: {error.strerror}", advice))
    return looks


def _limits() -> list[Look]:
    looks = []
    for name, number, least, option in (
        ("open files", resource.RLIMIT_NOFILE, FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, PROCESSES, "-u"),
        ("address space", resource.RLIMIT_AS, 16 << 30, "-v"),
    ):
        soft, _ = resource.getrlimit(number)
        if soft == resource.RLIM_INFINITY:
            looks.append(Look(f"limit of {name}", "none"))
        else:
            advice = f"raise it: ulimit {option} {least >> 10 if option == '-v' else least}" if soft < least else ""
            looks.append(Look(f"limit of {name}", str(soft), advice))
    return looks


def _group() -> list[Look]:
    name = "gloo on loopback"
    begun = time.monotonic()
    try:
        with Harness(preload=("torch.distributed",)) as harness:
            job = Job(target="fsdp_testkit.ranks.doctor:probe", world_size=2, deadline=20.0)
            report = harness.run(job, explain_hangs=False)
    except (EnvironmentLacksError, OSError) as error:
        return [Look(name, str(error), "ranks cannot be started: see the message", fatal=True)]
    if report.failure is not None:
        advice = "a firewall or a missing loopback interface (ip link set lo up) is the usual reason"
        return [Look(name, report.failure.summary, advice, fatal=True)]
    whole = time.monotonic() - begun
    said = report.replies[0].value
    gpus = said["gpus"]
    cuda = f"torch is built for CUDA {said['cuda']}" if said["cuda"] else "torch is built for CPUs only"
    looks = [
        Look(name, f"two ranks agree on a sum: {report.seconds:.1f} s, first start of all {whole:.1f} s"),
        Look("NCCL", said["nccl"] or "not in this build of torch"),
        Look("CUDA", f"{cuda}, {gpus} GPU{'s' * (gpus != 1)} visible"),
    ]
    if gpus and not said["nccl"]:
        looks[1] = Look("NCCL", "not in this build of torch", "install a CUDA build of torch to use the GPUs with NCCL")
    return looks
