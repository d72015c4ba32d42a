"""Eight saves and loads in one process: every load is what was saved, and nothing is left behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, inner_model, reply
from fsdp_testkit.scenarios.train import train


def repeat(context: Any, *, case: str, checkpoint: str, folder: str, formats: list[str]) -> dict[str, Any]:
    """Train a step, then save and load once for each of ``formats``, each time what was loaded the time before.

    Facts: ``rounds``, each with ``format``, ``changed`` (parameters and persistent buffers whose bits are not those
    of the first save), ``tensors`` and ``bytes`` (alive in this process after the load), ``files`` (open
    descriptors), ``threads``.
    """
    parsed = Case.from_json(case)
    evidence = Evidence(rank=context.rank)
    rounds: list[dict[str, Any]] = []
    evidence.facts["rounds"] = rounds
    with armed(parsed, context) as backend:
        loaded = Loaded(parsed, backend, Path(checkpoint))
        train(loaded, context.rank, Evidence(rank=context.rank), range(1))
        wanted = held(loaded)
        for number, layout in enumerate(formats):
            target = Path(folder) / str(number)
            backend.save(loaded.model, target, layout=layout)
            dist.barrier()  # a rank may return before the others' files are written
            del loaded
            gc.collect()
            loaded = Loaded(parsed, backend, target)
            found = held(loaded)
            changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            rounds.append({"format": layout, "changed": changed} | census())
            dist.barrier()
    return reply(context, evidence)


def held(loaded: Loaded) -> dict[str, str]:
    """Return a digest of this rank's part of every parameter and persistent buffer."""
    model = inner_model(loaded.model)
    persistent = model.state_dict(keep_vars=True).keys()
    plain = Evidence(rank=0)
    observe.observe_tensors(((n, b) for n, b in model.named_buffers() if n in persistent), plain, "")
    return observe.digests(model) | {name: bytes(tensor.data).hex() for name, tensor in plain.tensors.items()}


def census() -> dict[str, int]:
    """Count what is alive in this process."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    plain = [item for item in tensors if type(item) in (torch.Tensor, torch.nn.Parameter) and not item.is_meta]
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in plain}
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }
