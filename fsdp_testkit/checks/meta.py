"""Meta-init loading: no rank builds or initialises a full model in vain, nothing stays on meta."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a load may cost.

    Attributes:
        allocated: new storages of a rank, as multiples of what it keeps and the largest tensor: reading a slice and
            its final copy, plus conversions. A rank that builds the whole model exceeds it at two ranks and more.
        read: bytes taken out of the weight files by all ranks of a replica, as multiples of these files. Each rank
            reading all of them is the number of its ranks.
        peak: growth of anonymous and shared memory of a rank, in the same multiples as ``allocated``.
    """

    allocated: float = 3.0
    read: float = 1.5
    peak: float = 3.0


#: Budgets by backend; others have the default.
BUDGETS: dict[str, Budget] = {"reference": Budget(allocated=1.75, read=1.25), "transformers": Budget(read=1.25)}
#: Bytes by which a process grows or reads for other reasons: allocators, modules, config files.
NOISE = 8 * 2**20
READ_NOISE = 2**18


def check_meta_init(evidences: list[Evidence], layout: Layout, backend: str = "") -> Verdict:
    """Judge what a load read, allocated, initialised and left on each rank."""
    budget = BUDGETS.get(backend, Budget())
    verdict = _check_reads(evidences, layout, budget)
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
        bound = int(budget.allocated * (load["shard_bytes"] + load["largest_bytes"]) + 4 * load["buffer_bytes"] + 4096)
        verdict.expect(
            load["allocated"] <= bound,
            message=f"the load allocated {load['allocated']:,} bytes on this rank, which keeps "
            f"{load['shard_bytes']:,} of the model's {load['model_bytes']:,}",
            expected=f"at most {bound:,} bytes",
            actual=f"{load['allocated']:,} bytes",
            detail={name: load.get(name, 0) for name in ("allocated", "gathered", "model_bytes", "shard_bytes")},
            **where,
        )
        held = int(budget.peak * (load["shard_bytes"] + load["largest_bytes"]) + 4 * load["buffer_bytes"] + NOISE)
        peak = load["memory"]["peak"]
        verdict.expect(
            peak <= held,
            message=f"the memory of this rank's process grew by {peak:,} bytes during the load, of which it keeps "
            f"{load['shard_bytes']:,}",
            expected=f"at most {held:,} bytes of anonymous and shared memory",
            actual=f"{peak:,} bytes",
            detail={"peak": peak, "shard_bytes": load["shard_bytes"], "model_bytes": load["model_bytes"]},
            **where,
        )
        # replicas of small tables and caches are no full tensors; what is as large as the largest one is
        verdict.expect(
            load["stray"] <= load["largest_bytes"] // 2 + 2 * load["buffer_bytes"] + 4096,
            message=f"{load['stray']:,} bytes of tensors outlive the load beside the model",
            expected=f"less than half of the largest tensor ({load['largest_bytes']:,} bytes)",
            actual=f"{load['stray']:,} bytes",
            **where,
        )
        _check_environment(load["environment"], verdict, where)
        for kind in ("parameters", "buffers"):
            left = [name for name, facts in evidence.facts[kind].items() if facts["meta"]]
            verdict.expect(not left, message=f"{kind} left on the meta device: {left[:5]}", **where)
    return verdict


def _check_reads(evidences: list[Evidence], layout: Layout, budget: Budget) -> Verdict:
    """Judge how often the files are read: at most once in each replica, conversions and tables apart."""
    verdict = Verdict.empty()
    replicas: dict[int, int] = defaultdict(int)
    total = 0
    for evidence in evidences:
        load = evidence.facts["load"]
        total = load["checkpoint_bytes"]
        by_calls = max(0, load["read_calls"] - READ_NOISE)
        replicas[evidence.rank // layout.shard] += load["read"] + by_calls
    for replica, read in replicas.items():
        verdict.expect(
            read <= budget.read * total,
            check="meta_init",
            message=f"the ranks of replica {replica} read {read:,} bytes of weight files that hold {total:,}",
            expected=f"at most {budget.read} times the files",
            actual=f"{read / max(1, total):.2f} times",
        )
    return verdict


def _check_environment(environment: dict[str, Any], verdict: Verdict, where: dict[str, Any]) -> None:
    """Judge that switches were set while they were needed, and that the environment is what it was."""
    for name, value in environment["switches"].items():
        seen = environment["values"].get(name, [])
        verdict.expect(
            value in seen,
            message=f"the backend's switch {name}={value} was not set during the load",
            expected=value,
            actual=", ".join(map(str, seen)) or "never set",
            **where,
        )
    verdict.expect(
        not environment["left"],
        message=f"the load leaves environment variables changed: {', '.join(environment['left'][:5])}",
        expected="the environment as it was",
        **where,
    )
