"""What the parent tells its ranks: the job with the environment, path and folders of the moment, as JSON data."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_testkit.ranks.job import Job

if TYPE_CHECKING:
    from fsdp_testkit.ranks.link import Store

#: Ranks share the cores: one thread each. These are read when the libraries are loaded, so the server has them too.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
#: Seconds after the deadline at which the process group would give up. The harness's deadline comes first, with the
#: stacks of all ranks; a timeout of the group would show one rank's traceback and hide where the others are.
GROUP_PATIENCE = 30.0
#: Part of the deadline after which NCCL's watchdog gives up. It comes first: it writes down what each rank was in, and
#: ends ranks that wait on a GPU, which look busy from outside.
NCCL_SHARE = 0.8
#: Has torch check that the ranks call the same collectives.
DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def rank_spec(
    job: Job, identity: str, attempt: int, folder: Path, logs: Path, store: Store | None, begun: float
) -> dict[str, Any]:
    """Return what all ranks of one attempt read first.

    Args:
        job: what is run.
        identity: of the job; with ``attempt`` the prefix of its keys in the store.
        attempt: 0, or 1 in the run that explains a hang.
        folder: the job's folder.
        logs: folder of its logs and stacks.
        store: where the ranks meet; ``None`` for none.
        begun: when the job began, on the clock of ``time.monotonic``.
    """
    env = dict(os.environ)
    if job.device == "cpu":
        env |= ONE_THREAD
    else:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts
    if store is not None and (name := _loopback()):
        env["GLOO_SOCKET_IFNAME"] = name
    env |= {"WORLD_SIZE": str(job.world_size), "LOCAL_WORLD_SIZE": str(job.processes)}
    return {
        "job": identity,
        "attempt": attempt,
        "target": job.target,
        "args": job.args,
        "world_size": job.world_size,
        "device": job.device,
        "comm": job.comm,
        "deadline": begun + job.deadline,
        "group_timeout": group_timeout(job, attempt),
        "recorded": job.comm == "nccl" or (attempt > 0 and job.comm == "gloo"),
        "store_host": store.host if store is not None else "",
        "store_port": store.port if store is not None else 0,
        "local_ranks": list(range(job.processes)),
        "env": env | job.env,
        "job_env": job.env,
        "path": [str(entry) for entry in sys.path],
        "cwd": _cwd(),
        "folder": str(folder),
        "logs": str(logs),
    }


def group_timeout(job: Job, attempt: int) -> float:
    """Return the seconds after which a process group gives up."""
    if job.comm == "nccl":
        return NCCL_SHARE * job.deadline
    if checks_collectives(job, attempt):  # giving up in time makes it name the rank that is missing
        return job.deadline / 2
    return job.deadline + GROUP_PATIENCE


def checks_collectives(job: Job, attempt: int) -> bool:
    """Tell whether this is a second run in which torch checks collectives."""
    return attempt > 0 and job.env.items() >= DETAIL.items()


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # deleted under us
        return "/"
