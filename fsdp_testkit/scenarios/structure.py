"""Structure at world sizes that the machine does not have: a lone process claims to be one rank after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdp_testkit.backends.groups import fake_group
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.scenarios import observe
from fsdp_testkit.scenarios.arming import armed
from fsdp_testkit.scenarios.common import Loaded, reply


def run(context: Any, *, claims: list[list[Any]], checkpoint: str) -> dict[str, Any]:
    """Load under a fake process group as each claimed rank in turn; structure only.

    ``claims`` holds [case, rank to claim]; the evidence of the first is ``claim0``, of the second ``claim1``, ...
    """
    replies: dict[str, Any] = {}
    for index, (text, rank) in enumerate(claims):
        evidence = claim(context, Case.from_json(text), rank, Path(checkpoint))
        replies |= reply(context, evidence, f"claim{index}")
    return replies


def claim(context: Any, case: Case, rank: int, checkpoint: Path) -> Evidence:
    """Observe the structure that ``rank`` would have."""
    evidence = Evidence(rank=rank)
    plain = replace(case, layout=replace(case.layout, comm="gloo"))
    with fake_group(rank, case.layout.world_size), armed(plain, context) as backend:
        loaded = Loaded(plain, backend, checkpoint)
        evidence.facts["plan"] = loaded.plan
        evidence.facts["parameters"] = observe.observe_parameters(loaded.model)
        evidence.facts["buffers"] = {
            name: observe.describe(buffer) for name, buffer in loaded.model.named_buffers(remove_duplicate=False)
        }
        evidence.facts["units"] = observe.observe_units(loaded.model)
    return evidence
