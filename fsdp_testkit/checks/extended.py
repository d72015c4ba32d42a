"""What the extended tier judges beside the training trace: reductions, recomputation, dtypes, evaluation, growth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import compare_number
from fsdp_testkit.checks.tolerances import tolerance
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict

#: Fewer elements say nothing about the dtype of a reduction: sums may be round by chance.
ENOUGH = 16
#: Counts of `rounds` that must not grow, and in which unit.
GROWTH = {"tensors": "tensors alive", "bytes": "bytes in tensors", "files": "open files", "threads": "threads"}


def check_reductions(last: list[Evidence], each: list[Evidence], micro_batches: int) -> Verdict:
    """Judge that a step reduces once where it should, and as often as it has micro-batches where that is asked for."""
    verdict = Verdict.empty()
    for once, often in zip(last, each, strict=True):
        few, many = reductions(once), reductions(often)
        verdict.expect(
            few > 0,
            check="reductions",
            rank=once.rank,
            message=f"no reduce-scatter was seen in {micro_batches} micro-batches of training",
            expected="one for each unit that is trained, in each step",
        )
        verdict.expect(
            many == few * micro_batches,
            check="reductions",
            rank=once.rank,
            message=f"{few} reduce-scatters where gradients are reduced in the last of {micro_batches} micro-batches, "
            f"{many} where they are reduced in each",
            expected=f"{few * micro_batches} in the second case, or a {micro_batches}rd of its number in the first",
        )
    return verdict


def reductions(evidence: Evidence) -> int:
    """Return the number of reduce-scatters of a run."""
    return sum(count for name, count in evidence.facts["collectives"].items() if "reduce_scatter" in name)


def check_recomputed(evidences: list[Evidence]) -> Verdict:
    """Judge that activation checkpointing is really on: in training, some module runs twice for once in evaluation."""
    verdict = Verdict.empty()
    for evidence in evidences:
        forwards: dict[str, list[int]] = evidence.facts["forwards"]
        again = [name for name, (training, once) in forwards.items() if training >= 2 * once > 0]
        verdict.expect(
            bool(again),
            check="recomputation",
            rank=evidence.rank,
            message="no module's forward ran again in backward: activation checkpointing is off",
            expected="twice the forwards of evaluation in some module",
            actual=f"as many in all {len(forwards)}",
        )
    return verdict


def check_precision(evidences: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Judge mixed precision: dtypes in forwards, dtypes of gradients, and the dtype that they were reduced in."""
    verdict = Verdict.empty()
    kept = set(truth.facts["kept_in_fp32"])
    low = case.option("mixed_precision")
    for evidence in evidences:
        parameters = evidence.facts["parameters"]
        for name, seen in evidence.facts["computed"].items():
            wanted = "float32" if name in kept else low
            verdict.expect(
                seen == [wanted],
                check="precision",
                rank=evidence.rank,
                parameter=name,
                message=f"{name} is {' and '.join(seen)} in forward instead of {wanted}"
                + (": the model keeps it in fp32" if name in kept else ""),
                expected=wanted,
                actual=", ".join(seen),
            )
        for step in range(case.steps):
            for name, gradient in evidence.under(f"gradient/{step}/"):
                verdict.expect(
                    gradient.dtype == parameters[name]["dtype"],
                    check="precision",
                    rank=evidence.rank,
                    step=step,
                    parameter=name,
                    message=f"the gradient of {name} has dtype {gradient.dtype}",
                    expected=parameters[name]["dtype"],
                    actual=gradient.dtype,
                )
    verdict.add(_check_reduced_in_fp32(evidences, truth, case, kept))
    return verdict


def _check_reduced_in_fp32(evidences: list[Evidence], truth: Evidence, case: Case, kept: set[str]) -> Verdict:
    """A mean over ranks that was taken in bf16 has values of bf16 only; one in fp32 has others too."""
    verdict = Verdict.empty()
    for name in truth.facts["gradients"]["0"]:
        if name in kept:
            continue
        keys = [f"gradient/{step}/{name}" for step in range(case.steps)]
        wanted = sum(fine(truth, key) for key in keys)
        found = sum(fine(evidence, key) for evidence in evidences for key in keys)
        if wanted >= ENOUGH:
            verdict.expect(
                found > 0,
                check="precision",
                parameter=name,
                message=f"the gradient of {name} holds values of {case.option('mixed_precision')} only: "
                "it was reduced in that dtype",
                expected="reduced in float32",
                judged_by="truth",
            )
    return verdict


def fine(evidence: Evidence, key: str) -> int:
    """Return the number of elements of an fp32 tensor that bf16 cannot hold."""
    tensor = evidence.tensors.get(key)
    if tensor is None or tensor.dtype != "float32":
        return 0
    return int(np.count_nonzero(np.ascontiguousarray(tensor.bits()).view(np.uint32) & np.uint32(0xFFFF)))


def check_evaluation(evidences: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Judge evaluation between steps: its losses are truth's, and it leaves no trace."""
    verdict = Verdict.empty()
    limit = tolerance(case.dtype, case.layout.device).loss
    for evidence in evidences:
        for step, result in evidence.facts["evaluation"].items():
            where: dict[str, Any] = {"check": "evaluation", "rank": evidence.rank, "step": int(step)}
            wanted = truth.facts["evaluation"][step][evidence.rank]
            for actual, expected in zip(result["losses"], wanted, strict=True):
                compare_number(verdict, actual, expected, tolerance=limit, judged_by="truth", **where)
            changed = result["changed"]
            verdict.expect(
                not changed,
                parameter=changed[0] if changed else "",
                message=f"evaluation changed {len(changed)} things: {', '.join(changed[:3])}",
                expected="the same bits as before",
                **where,
            )
    return verdict


def differs_between_ranks(truth: Evidence) -> bool:
    """Return whether some expert gets no token on one rank, and gets some on another, in the same step."""
    idle: dict[tuple[int, str, int], int] = {}
    for item in truth.facts["idle_experts"]:
        for expert in item["experts"]:
            key = (item["step"], item["parameter"], expert)
            idle[key] = idle.get(key, 0) + 1
    ranks = len(truth.facts["losses"]["0"])
    return any(count < ranks for count in idle.values())


def check_rounds(evidences: list[Evidence]) -> Verdict:
    """Judge repeated saving and loading: the same bits each time, and nothing of which there is more every time.

    What grows once is a cache that was filled; what grows in each of a format's last rounds is a leak.
    """
    verdict = Verdict.empty()
    for evidence in evidences:
        rounds = evidence.facts["rounds"]
        for number, result in enumerate(rounds):
            changed = result["changed"]
            verdict.tensors += 1
            verdict.expect(
                not changed,
                check="drift",
                rank=evidence.rank,
                parameter=changed[0] if changed else "",
                message=f"round {number + 1} ({result['format']}) loads other bits of {len(changed)} tensors "
                f"than the first one saved: {', '.join(changed[:3])}",
                expected="equal bits",
            )
        for layout in dict.fromkeys(result["format"] for result in rounds):
            last = [result for result in rounds if result["format"] == layout][-3:]
            for key, what in GROWTH.items():
                counts = [result[key] for result in last]
                verdict.expect(
                    not all(later > earlier for earlier, later in pairwise(counts)),
                    check="growth",
                    rank=evidence.rank,
                    message=f"more {what} after each save and load ({layout}): {counts}",
                    expected=f"no more than {counts[0]}",
                    actual=str(counts[-1]),
                )
    return verdict


def check_refusal(evidences: list[Evidence], complete: bool) -> Verdict:
    """Judge a save that one rank called: it must not leave a checkpoint that looks complete behind an error."""
    verdict = Verdict.empty()
    lone = evidences[0].facts["lone"]
    verdict.expect(
        not (lone["refused"] and complete),
        check="lone_save",
        rank=0,
        message=f"the save failed ({lone['refused'][:120]}) and left a folder that looks complete",
        expected="no weights, or those from before",
    )
    return verdict
