"""Training: losses, every gradient at every step, norms, weights, optimizer state, movement, replicas."""

from __future__ import annotations

from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import compare, compare_number, expected_part, shard_dim
from fsdp_testkit.checks.tolerances import Tolerance, tolerance
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Array, Evidence
from fsdp_testkit.core.finding import Verdict


def check_batches(evidences: list[Evidence]) -> Verdict:
    """Judge the harness itself: every rank and step has data of its own, tokens are unequal somewhere."""
    verdict = Verdict.empty()
    seen: dict[str, tuple[int, str]] = {}
    for evidence in evidences:
        for step, digests in evidence.facts["batches"].items():
            for digest in digests:
                other = seen.setdefault(digest, (evidence.rank, step))
                verdict.expect(
                    other == (evidence.rank, step),
                    check="batches",
                    rank=evidence.rank,
                    step=int(step),
                    message=f"rank {evidence.rank} has the same batch as rank {other[0]} at step {other[1]}: "
                    "a missing reduction would be invisible",
                )
    steps = evidences[0].facts["tokens"]
    uneven = any(len({sum(e.facts["tokens"][step]) for e in evidences}) > 1 for step in steps)
    verdict.expect(
        uneven or len(evidences) == 1,
        check="batches",
        message="all ranks have the same number of valid tokens at every step: a wrong normaliser would be invisible",
    )
    return verdict


def check_routing(truth: Evidence) -> Verdict:
    """Judge the harness itself: with experts, every rank's data reaches every expert."""
    verdict = Verdict.empty()
    idle = truth.facts["idle_experts"]
    verdict.expect(
        not idle,
        check="routing",
        message=f"experts without a token from some rank: {idle[:3]}",
        judged_by="truth",
    )
    return verdict


def check_initial(evidences: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Judge the weights right after loading: bit-equal to the model that the checkpoint was made from."""
    verdict = Verdict.empty()
    for evidence in evidences:
        for name, tensor in truth.under("initial/"):
            _local(verdict, evidence, case, f"initial/{name}", name, tensor.array(), 0.0, "initial_weights")
    return verdict


def check_training(evidences: list[Evidence], oracle: Evidence, case: Case, judged_by: str) -> Verdict:
    """Compare the whole trace of every rank with an oracle's.

    Args:
        evidences: one per rank, holding local shards.
        oracle: full tensors: truth, or rank 0 of DDP (its ranks are compared with truth on their own).
        case: gives layout, dtype and steps.
        judged_by: ``truth`` or ``ddp``.
    """
    verdict = Verdict.empty()
    limits = tolerance(case.dtype, case.layout.device)
    for evidence in evidences:
        _losses(verdict, evidence, oracle, case, limits, judged_by)
        _gradients(verdict, evidence, oracle, case, limits, judged_by)
        for name, tensor in oracle.under("final/"):
            expected = tensor.array()
            _local(verdict, evidence, case, f"final/{name}", name, expected, limits.weight, "weights", judged_by)
            if f"gathered/{name}" in evidence.tensors:
                compare(
                    verdict,
                    evidence.tensors[f"gathered/{name}"],
                    expected,
                    tolerance=limits.weight,
                    check="gathered_weights",
                    rank=evidence.rank,
                    parameter=name,
                    judged_by=judged_by,
                )
        _optimizer(verdict, evidence, oracle, case, limits, judged_by)
    return verdict


def _losses(
    verdict: Verdict, evidence: Evidence, oracle: Evidence, case: Case, limits: Tolerance, judged_by: str
) -> None:
    rank = evidence.rank
    for step in range(case.steps):
        key = str(step)
        where: dict[str, Any] = {"rank": rank, "step": step, "judged_by": judged_by}
        if judged_by == "truth":  # DDP's rank 0 knows its own losses only
            for micro, (actual, expected) in enumerate(
                zip(evidence.facts["losses"][key], oracle.facts["losses"][key][rank], strict=True)
            ):
                del micro
                compare_number(verdict, actual, expected, tolerance=limits.loss, check="losses", **where)
        compare_number(
            verdict,
            evidence.facts["norms"][key],
            oracle.facts["norms"][key],
            tolerance=limits.norm,
            check="gradient_norm",
            **where,
        )
        verdict.expect(
            np.allclose(evidence.facts["lrs"][key], oracle.facts["lrs"][key], rtol=1e-12),
            check="learning_rate",
            message=f"learning rates {evidence.facts['lrs'][key]} instead of {oracle.facts['lrs'][key]}",
            **where,
        )


def _gradients(
    verdict: Verdict, evidence: Evidence, oracle: Evidence, case: Case, limits: Tolerance, judged_by: str
) -> None:
    for step in range(case.steps):
        wanted = set(oracle.facts["gradients"][str(step)])
        found = set(evidence.facts["gradients"][str(step)])
        where: dict[str, Any] = {"check": "gradients", "rank": evidence.rank, "step": step, "judged_by": judged_by}
        # a gradient of zeros and no gradient are the same update only without weight decay and momentum
        for name in sorted(wanted ^ found):
            zero = name in found and not np.any(evidence.tensors[f"gradient/{step}/{name}"].array())
            verdict.expect(
                zero,
                parameter=name,
                message=f"{name} has {'no' if name in wanted else 'a'} gradient",
                expected="a gradient" if name in wanted else "none",
                actual="none" if name in wanted else "a gradient",
                **where,
            )
        for name in wanted & found:
            full = oracle.tensors[f"gradient/{step}/{name}"].array()
            _local(
                verdict,
                evidence,
                case,
                f"gradient/{step}/{name}",
                name,
                full,
                limits.gradient,
                "gradients",
                judged_by,
                step,
            )


def _optimizer(
    verdict: Verdict, evidence: Evidence, oracle: Evidence, case: Case, limits: Tolerance, judged_by: str
) -> None:
    for name, tensor in oracle.under("optimizer/"):
        fqn = name.rpartition("/")[0]
        _local(
            verdict, evidence, case, f"optimizer/{name}", fqn, tensor.array(), limits.optimizer, "optimizer", judged_by
        )
    check_binding(verdict, evidence, oracle, judged_by)


def check_binding(verdict: Verdict, evidence: Evidence, oracle: Evidence, judged_by: str) -> None:
    """The optimizer holds the model's own parameters, in the right groups with the right options."""
    found, wanted = evidence.facts["optimizer"], oracle.facts["optimizer"]
    where: dict[str, Any] = {"check": "optimizer_binding", "rank": evidence.rank, "judged_by": judged_by}
    verdict.expect(
        not found["unbound"],
        message=f"the optimizer holds {len(found['unbound'])} tensors that are not the model's parameters, "
        f"of shapes {found['unbound'][:3]}",
        expected="every optimizer parameter is the model's own object",
        **where,
    )
    verdict.expect(
        [group["parameters"] for group in found["groups"]] == [group["parameters"] for group in wanted["groups"]],
        message="parameter groups hold other parameters than asked for",
        expected=str([len(group["parameters"]) for group in wanted["groups"]]),
        actual=str([len(group["parameters"]) for group in found["groups"]]),
        **where,
    )
    for index, (ours, theirs) in enumerate(zip(found["groups"], wanted["groups"], strict=False)):
        for key in ("lr", "weight_decay", "eps"):
            verdict.expect(
                ours["options"].get(key) == theirs["options"].get(key),
                message=f"group {index} has {key}={ours['options'].get(key)}",
                expected=str(theirs["options"].get(key)),
                actual=str(ours["options"].get(key)),
                **where,
            )
    for name, scalars in wanted["scalars"].items():
        verdict.expect(
            found["scalars"].get(name) == scalars,
            parameter=name,
            message=f"optimizer scalars of {name} are {found['scalars'].get(name)} instead of {scalars}",
            **where,
        )


def check_movement(evidences: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Every parameter that has a gradient moves, on each rank that holds a part of it; frozen ones do not."""
    verdict = Verdict.empty()
    trained = {name for names in truth.facts["gradients"].values() for name in names}
    for evidence in evidences:
        for name, _ in truth.under("initial/"):
            before, after = evidence.tensors.get(f"initial/{name}"), evidence.tensors.get(f"final/{name}")
            if before is None or after is None or not before.numel or before.shape != after.shape:
                continue
            moved = bytes(before.data) != bytes(after.data)
            still = name in trained and not _part_moves(truth, evidence, case, name)
            verdict.expect(
                moved == (name in trained) or (still and not moved),
                check="movement",
                rank=evidence.rank,
                parameter=name,
                message=f"{name} {'moved although it has no gradient' if moved else 'did not move in training'}",
                expected="moves" if name in trained else "stays",
                actual="moved" if moved else "stayed",
                judged_by="truth",
            )
    return verdict


def check_replicas(evidences: list[Evidence], case: Case) -> Verdict:
    """Ranks that hold the same shard hold the same bits after every step (HSDP replicas, DDP ranks)."""
    verdict = Verdict.empty()
    twins: dict[int, Evidence] = {}
    for evidence in evidences:
        place = case.layout.coordinate(evidence.rank)[-1] if case.layout.kind == "hsdp" else 0
        first = twins.setdefault(place, evidence)
        if first is evidence:
            continue
        for step, digests in evidence.facts["digests"].items():
            for name, digest in digests.items():
                verdict.expect(
                    first.facts["digests"][step].get(name) == digest,
                    check="replicas",
                    rank=evidence.rank,
                    step=int(step),
                    parameter=name,
                    message=f"{name} on rank {evidence.rank} differs from its replica on rank {first.rank}",
                    expected="equal bits",
                    judged_by="replica",
                )
    return verdict


def _part_moves(truth: Evidence, evidence: Evidence, case: Case, name: str) -> bool:
    """Whether truth's own part that this rank holds moves (an embedding row that no batch uses may not)."""
    dim = shard_dim(evidence.facts["parameters"].get(name, {}))
    before = expected_part(truth.tensors[f"initial/{name}"].array(), case.layout, evidence.rank, dim)
    after = expected_part(truth.tensors[f"final/{name}"].array(), case.layout, evidence.rank, dim)
    return not np.array_equal(before, after)


def _local(
    verdict: Verdict,
    evidence: Evidence,
    case: Case,
    key: str,
    name: str,
    full: Array,
    limit: float,
    check: str,
    judged_by: str = "truth",
    step: int | None = None,
) -> None:
    """Compare this rank's raw local part under ``key`` with the rows of ``full`` that it must hold."""
    where: dict[str, Any] = {
        "check": check,
        "rank": evidence.rank,
        "parameter": name,
        "judged_by": judged_by,
        "step": step,
    }
    tensor = evidence.tensors.get(key)
    if not verdict.expect(tensor is not None, message=f"{key} was not observed on this rank", **where):
        return
    assert tensor is not None
    facts = evidence.facts["parameters"].get(name, {})
    expected = full
    if facts.get("dtensor", False):
        expected = expected_part(full, case.layout, evidence.rank, shard_dim(facts))
    if not expected.size and not tensor.numel:
        verdict.checks += 1
        return
    # the scale of the whole tensor, so that a shard of small values is not held to a tighter bound
    scale = float(np.nanmax(np.abs(full))) if full.size else 1.0
    compare(verdict, tensor, expected, tolerance=limit, scale=scale, **where)
