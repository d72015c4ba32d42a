"""Structure at world sizes that the machine does not have: one process claims every rank in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_testkit.backends.registry import make_backend
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, reply


def run(context: Any, *, cases: list[str], checkpoint: str) -> dict[str, Any]:
    """Load under a fake process group as each of the case's claimed ranks; structure only.

    The option ``ranks`` of a case lists the ranks to claim (default: first, second and last). Returns one
    evidence file per case and rank, named ``fake<case>_<rank>``.
    """
    replies: dict[str, Any] = {}
    for index, text in enumerate(cases):
        case = Case.from_json(text)
        world = case.layout.world_size
        for rank in case.option("ranks", sorted({0, 1 % world, world - 1})):
            evidence = claim(case, rank, Path(checkpoint))
            replies |= reply(context, evidence, f"fake{index}_{rank}")
    return replies


def claim(case: Case, rank: int, checkpoint: Path) -> Evidence:
    """Observe the structure that ``rank`` would have."""
    evidence = Evidence(rank=rank)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case.layout.world_size)
    try:
        plain = replace(case, layout=replace(case.layout, comm="gloo"))
        with armed(plain, make_backend(case.backend), rank=rank, facts=evidence.facts) as backend:
            loaded = Loaded(plain, backend, checkpoint)
            evidence.facts["tree"] = loaded.tree
            evidence.facts["plan"] = loaded.plan
            evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
            evidence.facts["buffers"] = {
                name: observe.describe(buffer) for name, buffer in loaded.model.named_buffers(remove_duplicate=False)
            }
            evidence.facts["units"] = observe.observe_units(loaded.model)
    finally:
        dist.destroy_process_group()
    return evidence
