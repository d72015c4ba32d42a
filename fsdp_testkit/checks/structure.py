"""Sharding structure, by rules over the module tree and the plan; never by the implementation's own helpers."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

from fsdp_testkit.checks.compare import chunk_bounds
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout

CHECK = "structure"


def check_structure(evidences: list[Evidence], tree: dict[str, Any], layout: Layout) -> Verdict:
    """Judge the structure that each rank reports.

    Args:
        evidences: one per observed rank (all ranks, or the claimed ones under a fake group).
        tree: `fsdp_testkit.models.tree.module_tree` of a model that the kit built itself.
        layout: the layout that was asked for.
    """
    verdict = Verdict.empty()
    for evidence in evidences:
        _parameters(verdict, evidence, tree, layout)
        _ties(verdict, evidence, tree)
        units = [set(unit["parameters"]) for unit in evidence.facts["units"]]
        _units_partition(verdict, evidence, tree, units)
        plan = evidence.facts["plan"]
        if isinstance(plan, dict):
            _manual_units(verdict, evidence, tree, units, plan)
        else:
            _auto_units(verdict, evidence, tree, units)
        if "kept" in evidence.facts:
            _reshard(verdict, evidence, tree, plan)
        modules = [name for unit in evidence.facts["units"] for name in unit["modules"]]
        verdict.expect(
            "" in modules,
            check=CHECK,
            rank=evidence.rank,
            message="the root module is not an FSDP unit, so nothing gathers what lies outside the blocks",
            expected="fully_shard applied to the model itself",
            actual=f"{len(modules)} wrapped modules, the root not among them",
        )
    if len(evidences) == layout.world_size:
        _sizes_add_up(verdict, evidences, tree, layout)
    return verdict


def _parameters(verdict: Verdict, evidence: Evidence, tree: dict[str, Any], layout: Layout) -> None:
    found = evidence.facts["parameters"]
    rank = evidence.rank
    missing = sorted(tree["parameters"].keys() - _all_names(found))
    extra = sorted(found.keys() - _all_names(tree["parameters"]))
    verdict.expect(
        not missing and not extra,
        check=CHECK,
        rank=rank,
        message=f"parameter names changed: missing {missing[:5]}, extra {extra[:5]}",
        expected=f"{len(tree['parameters'])} parameters",
        actual=f"{len(found)} parameters",
    )
    placements = ["R", "S0"] if layout.kind == "hsdp" else ["S0"]
    for name, facts in found.items():
        wanted = tree["parameters"].get(name)
        if wanted is None:
            continue
        where: dict[str, Any] = {"check": CHECK, "rank": rank, "parameter": name}
        verdict.expect(not facts["meta"], message=f"{name} is still on the meta device", **where)
        if not verdict.expect(
            facts["dtensor"],
            message=f"{name} is a plain tensor on every rank: no FSDP unit shards it",
            expected="DTensor",
            actual="Tensor",
            **where,
        ):
            continue
        verdict.expect(
            facts["shape"] == wanted["shape"],
            message=f"{name} has global shape {facts['shape']} instead of {wanted['shape']}",
            expected=str(wanted["shape"]),
            actual=str(facts["shape"]),
            **where,
        )
        verdict.expect(
            facts["requires_grad"] == wanted["requires_grad"],
            message=f"{name} has requires_grad={facts['requires_grad']} instead of {wanted['requires_grad']}",
            **where,
        )
        right_mesh = verdict.expect(
            facts["placements"] == placements and facts["mesh"] == list(layout.mesh_shape),
            message=f"{name} lies as {facts['placements']} on a mesh of {facts['mesh']}",
            expected=f"{placements} on {list(layout.mesh_shape)}",
            actual=f"{facts['placements']} on {facts['mesh']}",
            **where,
        )
        if right_mesh and wanted["shape"]:
            start, stop = chunk_bounds(wanted["shape"][0], layout.shard, layout.coordinate(rank)[-1])
            local = [stop - start, *wanted["shape"][1:]]
            verdict.expect(
                facts["local_shape"] == local or (stop == start and math.prod(facts["local_shape"]) == 0),
                message=f"{name} has local shape {facts['local_shape']} on this rank instead of {local}",
                expected=str(local),
                actual=str(facts["local_shape"]),
                **where,
            )


def check_ties(evidences: list[Evidence], tree: dict[str, Any]) -> Verdict:
    """Judge which parameters are one object, and nothing else of the structure."""
    verdict = Verdict.empty()
    for evidence in evidences:
        _ties(verdict, evidence, tree)
    return verdict


def _ties(verdict: Verdict, evidence: Evidence, tree: dict[str, Any]) -> None:
    """Parameters that were one object must be one object still, and no others."""
    found = {frozenset([name, *facts["aliases"]]) for name, facts in evidence.facts["parameters"].items()}
    for name, facts in tree["parameters"].items():
        group = frozenset([name, *facts["aliases"]])
        if len(group) > 1:
            verdict.expect(
                group in found,
                check="ties",
                rank=evidence.rank,
                parameter=name,
                message=f"{' and '.join(sorted(group))} are no longer one object: the tie was lost",
                expected="one Parameter object",
                actual="separate objects",
            )
    wanted = {frozenset([name, *facts["aliases"]]) for name, facts in tree["parameters"].items()}
    for group in found:
        if len(group) > 1:
            verdict.expect(
                group in wanted,
                check="ties",
                rank=evidence.rank,
                parameter=min(group),
                message=f"{' and '.join(sorted(group))} became one object although the model does not tie them",
            )


def _units_partition(verdict: Verdict, evidence: Evidence, tree: dict[str, Any], units: list[set[str]]) -> None:
    for name in tree["parameters"]:
        owners = [index for index, unit in enumerate(units) if name in unit]
        verdict.expect(
            len(owners) == 1,
            check=CHECK,
            rank=evidence.rank,
            parameter=name,
            message=f"{name} belongs to {len(owners)} FSDP units instead of exactly one",
            expected="1",
            actual=str(len(owners)),
        )


def _auto_units(verdict: Verdict, evidence: Evidence, tree: dict[str, Any], units: list[set[str]]) -> None:
    rank = evidence.rank
    names = set(tree["parameters"])
    tied = _tied_names(tree)
    for block in tree["blocks"]:
        inside = {name for name in names if name.startswith(f"{block}.")} - tied
        # modules kept in fp32 inside a bf16 model are units of their own: FSDP2 wants one dtype in a unit
        kept = _other_dtype(evidence, inside)
        # by name too: a root that holds nothing else than one forgotten block has just the same parameters
        alone = any(
            set(unit["parameters"]) == inside - kept and block in unit["modules"] for unit in evidence.facts["units"]
        )
        verdict.expect(
            alone,
            check=CHECK,
            rank=rank,
            parameter=block,
            message=f"block {block} ({tree['modules'][block]}) is not an FSDP unit of its own",
            expected=f"one unit with its {len(inside)} parameters",
            actual=_where_are(inside, units),
        )
    tail = {name for module in [*tree["norms"], *tree["heads"]] for name in _owned(tree, module)}
    last = set(tail)
    for embedding in tree["embeddings"]:
        owned = _owned(tree, embedding)
        if not owned or owned & tail:
            last |= owned
            continue
        verdict.expect(
            owned in units,
            check=CHECK,
            rank=rank,
            parameter=embedding,
            message=f"the input embedding {embedding} is not an FSDP unit of its own",
            expected=f"one unit with {sorted(owned)}",
            actual=_where_are(owned, units),
        )
    if last:
        kept = _other_dtype(evidence, last)
        verdict.expect(
            any(last - kept <= unit for unit in units)
            and not any(last & unit and _blocks(tree, unit) for unit in units),
            check=CHECK,
            rank=rank,
            parameter=[*tree["norms"], *tree["heads"]][-1],
            message=f"final norm and head ({', '.join(sorted(last))}) are not one FSDP unit",
            expected="one unit",
            actual=_where_are(last, units),
        )


def _manual_units(
    verdict: Verdict, evidence: Evidence, tree: dict[str, Any], units: list[set[str]], plan: dict[str, Any]
) -> None:
    rules, unmatched = expand_plan(plan, tree)
    for pattern in unmatched:
        verdict.expect(
            False,
            check=CHECK,
            rank=evidence.rank,
            message=f"plan rule {pattern!r} matches no module",
            expected="at least one module",
            actual="none",
        )
    verdict.expect(bool(rules), check=CHECK, rank=evidence.rank, message="the manual plan matches no module at all")
    for unit in expected_units(rules, tree):
        kept = _other_dtype(evidence, unit)
        along = _beside_aliases(tree, rules, unit)
        verdict.expect(
            all(any(part - kept <= own <= unit | along for own in units) for part in _parts(tree, rules, unit)),
            check=CHECK,
            rank=evidence.rank,
            parameter=min(unit),
            message=f"the plan's unit with {_short(unit)} does not exist",
            expected=f"one unit with {len(unit)} parameters",
            actual=_where_are(unit, units),
        )


def _reshard(verdict: Verdict, evidence: Evidence, tree: dict[str, Any], plan: Any) -> None:
    kept = {_canonical(tree).get(name, name) for name in evidence.facts["kept"]}
    wanted: dict[str, bool] = {}
    if isinstance(plan, dict):
        rules, _ = expand_plan(plan, tree)
        for module, options in rules.items():
            for name in _owned(tree, module) - _nested(tree, rules, module):
                flag = options.get("reshard_after_forward")
                if flag is not None and name not in _tied_names(tree):
                    wanted[name] = flag
    else:
        for block in tree["blocks"]:
            wanted |= {name: True for name in tree["parameters"] if name.startswith(f"{block}.")}
        tail = [*tree["heads"], *tree["norms"]]
        wanted |= {name: False for module in tail for name in _owned(tree, module)}
        for embedding in tree["embeddings"]:
            for name in _owned(tree, embedding):
                wanted.setdefault(name, True)
    for name, reshard in wanted.items():
        if not reshard and name in tree.get("idle", ()):
            continue  # a tower that no batch enters is never gathered
        verdict.expect(
            (name not in kept) == reshard,
            check="reshard",
            rank=evidence.rank,
            parameter=name,
            message=f"after a forward {name} is {'still gathered' if reshard else 'sharded again'}",
            expected=f"reshard_after_forward={reshard}",
            actual=f"reshard_after_forward={not reshard}",
        )


def _sizes_add_up(verdict: Verdict, evidences: list[Evidence], tree: dict[str, Any], layout: Layout) -> None:
    for name, facts in tree["parameters"].items():
        total = 0
        for evidence in evidences:
            found = evidence.facts["parameters"].get(name)
            total += math.prod(found["local_shape"]) if found else 0
        wanted = math.prod(facts["shape"]) * layout.replicate
        verdict.expect(
            total == wanted,
            check=CHECK,
            parameter=name,
            message=f"the local shards of {name} hold {total} elements over all ranks instead of {wanted}",
            expected=str(wanted),
            actual=str(total),
        )


def expand_plan(plan: dict[str, Any], tree: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return module FQN -> options for a manual plan, and the patterns that match nothing.

    ``*`` matches one path component; a later rule wins.
    """
    rules: dict[str, dict[str, Any]] = {}
    unmatched = []
    for pattern, options in plan["modules"].items():
        parts = pattern.split(".")
        matches = [
            name
            for name in tree["modules"]
            if len(name.split(".")) == len(parts)
            and all(fnmatch.fnmatchcase(own, part) for own, part in zip(name.split("."), parts, strict=True))
        ]
        if not matches:
            unmatched.append(pattern)
        for name in matches:
            rules[name] = options
    return rules, unmatched


def expected_units(rules: dict[str, dict[str, Any]], tree: dict[str, Any]) -> list[set[str]]:
    """Return the parameter sets of the plan's units: nested modules apart, tied modules together."""
    units: list[set[str]] = []
    for module in rules:
        own = _owned(tree, module) - _nested(tree, rules, module)
        if not own:
            continue
        overlapping = [unit for unit in units if unit & own]
        for unit in overlapping:
            units.remove(unit)
            own |= unit
        units.append(own)
    return units


def _parts(tree: dict[str, Any], rules: dict[str, dict[str, Any]], unit: set[str]) -> list[set[str]]:
    """Return what of a unit must stay together: all, or each block's own where blocks tie a part of themselves."""
    owned = [(_owned(tree, module) - _nested(tree, rules, module)) & unit for module in rules]
    own = [names - _tied_names(tree) for names in owned if names]
    return own if len(own) > 1 and all(own) else [unit]


def _beside_aliases(tree: dict[str, Any], rules: dict[str, dict[str, Any]], unit: set[str]) -> set[str]:
    """Return what may join a unit: modules outside of the plan that also hold one of its parameters."""
    holders = {alias.rpartition(".")[0] for name in unit for alias in [name, *tree["parameters"][name]["aliases"]]}
    planned = set().union(*(_owned(tree, module) for module in rules))
    return {name for holder in holders if holder for name in _owned(tree, holder)} - (planned - unit)


def _nested(tree: dict[str, Any], rules: dict[str, dict[str, Any]], module: str) -> set[str]:
    inner = [name for name in rules if name != module and name.startswith(f"{module}.")]
    return set().union(*(_owned(tree, name) for name in inner)) if inner else set()


def _owned(tree: dict[str, Any], module: str) -> set[str]:
    """Return canonical names of the parameters under ``module``, through aliases too."""
    if not module:
        return set()
    return {
        name
        for name, facts in tree["parameters"].items()
        if any(alias.startswith(f"{module}.") for alias in [name, *facts["aliases"]])
    }


def _canonical(tree: dict[str, Any]) -> dict[str, str]:
    return {alias: name for name, facts in tree["parameters"].items() for alias in facts["aliases"]}


def _tied_names(tree: dict[str, Any]) -> set[str]:
    return {name for name, facts in tree["parameters"].items() if facts["aliases"]}


def _all_names(parameters: dict[str, Any]) -> set[str]:
    return {alias for name, facts in parameters.items() for alias in [name, *facts["aliases"]]}


def _blocks(tree: dict[str, Any], unit: set[str]) -> bool:
    return any(name.startswith(f"{block}.") for name in unit for block in tree["blocks"])


def _other_dtype(evidence: Evidence, names: set[str]) -> set[str]:
    """Return those of ``names`` whose dtype is not the most common one."""
    found = evidence.facts["parameters"]
    dtypes = [found[name]["dtype"] for name in names if name in found]
    if len(set(dtypes)) < 2:
        return set()
    common = max(set(dtypes), key=dtypes.count)
    return {name for name in names if name in found and found[name]["dtype"] != common}


def _where_are(names: set[str], units: list[set[str]]) -> str:
    owners = [unit for unit in units if unit & names]
    if not owners:
        return "in no unit"
    return "; ".join(f"{len(unit & names)} of them in a unit of {len(unit)}" for unit in owners[:4])


def _short(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
