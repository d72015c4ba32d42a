"""A save that one rank alone calls: the usual slip is ``if rank == 0: save(...)``."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fsdp_testkit.core.case import Case
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import reply
from fsdp_testkit.scenarios.train import begin, train

#: Time limit of the group's collectives during the save, in seconds: nobody else will come.
PATIENCE = 2.0


def save(context: Any, *, case: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """Train a step; then rank 0 alone saves to ``folder``, under a group that gives up after `PATIENCE`.

    Facts: ``lone`` on rank 0, with ``refused`` (the exception's text; ``""`` where the save returned) and
    ``seconds``. The evidence holds the trained weights as ``final/``. The process group is of no use afterwards.
    """
    parsed = Case.from_json(case)
    done = Path(folder).with_name("lone.done")
    with armed(parsed, context) as backend:
        loaded, evidence = begin(parsed, context.rank, backend, Path(checkpoint))
        train(loaded, context.rank, evidence, range(1))
        dist.barrier()
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(timedelta(seconds=PATIENCE))
        if context.rank == 0:
            started, refused = time.monotonic(), ""
            try:
                backend.save(loaded.model, Path(folder), layout="safetensors")
            except Exception as error:  # whatever says no is a refusal
                refused = f"{type(error).__name__}: {error}"
            evidence.facts["lone"] = {"refused": refused[:500], "seconds": time.monotonic() - started}
            done.touch()
        else:
            while not done.exists():  # the harness's deadline ends it where rank 0 is stuck
                time.sleep(0.05)
    return reply(context, evidence)
