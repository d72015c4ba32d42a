"""Meta-init loading: no rank builds or initialises a full model in vain, nothing stays on meta."""

from __future__ import annotations

from typing import Any

from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict

#: New storages during a load, as multiples of what this rank keeps: reading a slice and its final copy,
#: plus conversions and the buffers. A rank that builds the whole model exceeds it at two ranks and more.
ALLOCATION_FACTOR = 3.0


def check_meta_init(evidences: list[Evidence]) -> Verdict:
    """Judge what a load allocated and initialised on each rank."""
    verdict = Verdict.empty()
    for evidence in evidences:
        load = evidence.facts["load"]
        where: dict[str, Any] = {"check": "meta_init", "rank": evidence.rank}
        verdict.expect(
            load["init_calls"] == 0,
            message=f"{load['init_calls']} init calls on {load['init_elements']} real elements during a load that "
            f"overwrites them: {', '.join(dict.fromkeys(load['init_names']))}",
            expected="0 init calls",
            actual=str(load["init_calls"]),
            detail={name: load[name] for name in ("init_elements", "model_bytes", "shard_bytes")},
            **where,
        )
        # the largest tensor may have to be converted whole, and buffers are computed on every rank
        bound = int(ALLOCATION_FACTOR * (load["shard_bytes"] + load["largest_bytes"]) + 4 * load["buffer_bytes"] + 4096)
        verdict.expect(
            load["allocated"] <= bound,
            message=f"the load allocated {load['allocated']:,} bytes on this rank, which keeps "
            f"{load['shard_bytes']:,} of the model's {load['model_bytes']:,}",
            expected=f"at most {bound:,} bytes",
            actual=f"{load['allocated']:,} bytes",
            detail={name: load.get(name, 0) for name in ("allocated", "gathered", "model_bytes", "shard_bytes")},
            **where,
        )
        for kind in ("parameters", "buffers"):
            left = [name for name, facts in evidence.facts[kind].items() if facts["meta"]]
            verdict.expect(not left, message=f"{kind} left on the meta device: {left[:5]}", **where)
    return verdict
