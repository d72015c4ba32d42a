"""Training: losses, every gradient at every step, norms, weights, optimizer state, movement, replicas."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import compare, compare_number, expected_part, first_row, shard_dim
from fsdp_testkit.checks.tolerances import Tolerance, tolerance
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Array, Evidence
from fsdp_testkit.core.finding import Verdict

#: A tensor whose gradient is much smaller than the model's largest one is sums of larger terms that cancel:
#: its rounding is that of the terms. Its scale is therefore at least this share of the largest gradient.
GRADIENT_FLOOR = 1e-3


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
    """Judge the harness itself: with experts, every rank's data reaches every expert that any rank's reaches."""
    verdict = Verdict.empty()
    ranks, steps = len(truth.facts["losses"]["0"]), len(truth.facts["losses"])
    idle: dict[tuple[str, int], dict[int, int]] = {}
    for item in truth.facts["idle_experts"]:
        for expert in item["experts"]:
            per_rank = idle.setdefault((item["parameter"], expert), {})
            per_rank[item["rank"]] = per_rank.get(item["rank"], 0) + 1
    starved = [
        (name, expert, rank)
        for (name, expert), per_rank in idle.items()
        for rank, count in per_rank.items()
        if count == steps and sum(per_rank.values()) < steps * ranks
    ]
    verdict.expect(
        not starved,
        check="routing",
        message=f"no token of one rank reaches an expert at any step (parameter, expert, rank): {starved[:3]}",
        judged_by="truth",
    )
    return verdict


def check_initial(evidences: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Judge the weights right after loading: bit-equal to the model that the checkpoint was made from."""
    verdict = Verdict.empty()
    for evidence in evidences:
        look = _Look(verdict, evidence, case, "truth")
        for name, tensor in truth.under("initial/"):
            look.local(f"initial/{name}", name, tensor.array(), 0.0, "initial_weights")
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
    floors, moments = scale_floors(oracle, case.steps)
    for evidence in evidences:
        look = _Look(verdict, evidence, case, judged_by)
        look.losses(oracle, limits)
        look.gradients(oracle, limits, floors)
        for name, tensor in oracle.under("final/"):
            expected = tensor.array()
            look.local(f"final/{name}", name, expected, limits.weight, "weights")
            if f"gathered/{name}" in evidence.tensors:
                where = look.where("gathered_weights", name)
                compare(verdict, evidence.tensors[f"gathered/{name}"], expected, tolerance=limits.weight, **where)
        for name, tensor in oracle.under("optimizer/"):
            fqn, _, kind = name.rpartition("/")
            floor = moments.get(kind, 0.0)
            look.local(f"optimizer/{name}", fqn, tensor.array(), limits.optimizer, "optimizer", floor=floor)
        check_binding(verdict, evidence, oracle, judged_by)
    return verdict


def scale_floors(oracle: Evidence, steps: int) -> tuple[list[float], dict[str, float]]:
    """Return the least scale of a gradient at each step, and that of each moment of the optimizer by its name."""
    floors = [GRADIENT_FLOOR * largest(oracle, f"gradient/{step}/") for step in range(steps)]
    highest = max(floors, default=0.0)
    return floors, {"exp_avg": highest, "exp_avg_sq": highest**2}


def largest(evidence: Evidence, prefix: str) -> float:
    """Return the largest finite magnitude over all tensors under ``prefix``."""
    sizes = [float(np.nanmax(np.abs(tensor.array()), initial=0.0)) for _, tensor in evidence.under(prefix)]
    return max((size for size in sizes if np.isfinite(size)), default=0.0)


def same_rates(actual: list[float], expected: list[float]) -> bool:
    """Whether two optimizers have the same learning rate in each of their groups, and as many groups."""
    return len(actual) == len(expected) and bool(np.allclose(actual, expected, rtol=1e-12))


class _Look:
    """One rank's evidence beside an oracle: what is compared, and where it is said to be."""

    def __init__(self, verdict: Verdict, evidence: Evidence, case: Case, judged_by: str) -> None:
        self.verdict = verdict
        self.evidence = evidence
        self.case = case
        self.judged_by = judged_by

    def where(self, check: str, parameter: str = "", step: int | None = None) -> dict[str, Any]:
        """Return the fields of a finding of this rank."""
        return {
            "check": check,
            "rank": self.evidence.rank,
            "parameter": parameter,
            "judged_by": self.judged_by,
            "step": step,
        }

    def losses(self, oracle: Evidence, limits: Tolerance) -> None:
        """Compare losses, norms and learning rates of every step."""
        facts = self.evidence.facts
        for step in range(self.case.steps):
            key = str(step)
            if self.judged_by == "truth":  # DDP's rank 0 knows its own losses only
                wanted = oracle.facts["losses"][key][self.evidence.rank]
                for actual, expected in zip(facts["losses"][key], wanted, strict=True):
                    where = self.where("losses", step=step)
                    compare_number(self.verdict, actual, expected, tolerance=limits.loss, **where)
            where = self.where("gradient_norm", step=step)
            wanted = oracle.facts["norms"][key]
            compare_number(self.verdict, facts["norms"][key], wanted, tolerance=limits.norm, **where)
            self.verdict.expect(
                same_rates(facts["lrs"][key], oracle.facts["lrs"][key]),
                message=f"learning rates {facts['lrs'][key]} instead of {oracle.facts['lrs'][key]}",
                **self.where("learning_rate", step=step),
            )

    def gradients(self, oracle: Evidence, limits: Tolerance, floors: list[float]) -> None:
        """Compare presence and values of every gradient at every step."""
        for step, floor in enumerate(floors):
            wanted = set(oracle.facts["gradients"][str(step)])
            found = set(self.evidence.facts["gradients"][str(step)])
            # a gradient of zeros and no gradient are the same update only without weight decay and momentum
            for name in sorted(wanted ^ found):
                zero = name in found and not np.any(self.evidence.tensors[f"gradient/{step}/{name}"].array())
                self.verdict.expect(
                    zero,
                    message=f"{name} has {'no' if name in wanted else 'a'} gradient",
                    expected="a gradient" if name in wanted else "none",
                    actual="none" if name in wanted else "a gradient",
                    **self.where("gradients", name, step),
                )
            for name in sorted(wanted & found):
                key = f"gradient/{step}/{name}"
                self.local(key, name, oracle.tensors[key].array(), limits.gradient, "gradients", step, floor)

    def local(
        self,
        key: str,
        name: str,
        full: Array,
        limit: float,
        check: str,
        step: int | None = None,
        floor: float = 0.0,
    ) -> None:
        """Compare this rank's raw local part under ``key`` with the rows of ``full`` that it must hold."""
        where = self.where(check, name, step)
        tensor = self.evidence.tensors.get(key)
        if tensor is None:
            self.verdict.expect(False, message=f"{key} was not observed on this rank", **where)
            return
        facts = self.evidence.facts["parameters"].get(name, {})
        expected, first = full, 0
        if facts.get("dtensor", False):
            expected = expected_part(full, self.case.layout, self.evidence.rank, shard_dim(facts))
            first = first_row(full, self.case.layout, self.evidence.rank, shard_dim(facts))
        # the scale of the whole tensor, so that a shard of small values is not held to a tighter bound
        scale = partial(_scale, full, floor)
        compare(self.verdict, tensor, expected, tolerance=limit, scale=scale, full=full, first=first, **where)


def _scale(full: Array, floor: float) -> float:
    return max(float(np.nanmax(np.abs(full), initial=0.0)), floor)


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
                moved == (name in trained) or still,
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
    """Whether truth's own part that this rank holds moves by more than rounding.

    An embedding row that no batch uses does not, nor does a bias that adds the same to all keys of a softmax: its
    gradient is what rounding leaves of zero.
    """
    dim = shard_dim(evidence.facts["parameters"].get(name, {}))
    before = expected_part(truth.tensors[f"initial/{name}"].array(), case.layout, evidence.rank, dim)
    after = expected_part(truth.tensors[f"final/{name}"].array(), case.layout, evidence.rank, dim)
    rounding = 8 * np.finfo(np.float32).eps * float(np.max(np.abs(before), initial=0.0))
    return bool(np.max(np.abs(after - before), initial=0.0) > rounding)
