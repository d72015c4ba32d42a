"""Which checks judge which scenario. Pure: evidence in, verdict out."""

from __future__ import annotations

from dataclasses import replace

from fsdp_testkit.checks.sensitivity import Spread
from fsdp_testkit.checks.tolerances import AMPLIFICATION, ROUNDING_CAP
from fsdp_testkit.checks.training import (
    check_batches,
    check_initial,
    check_movement,
    check_replicas,
    check_routing,
    check_training,
)
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Finding, Verdict

#: What the name of a check begins with where DDP is what was judged.
ORACLE = "oracle_"
#: Checks whose findings may be rounding: an fp64 run decides.
NUMERIC = frozenset({"losses", "gradients", "gradient_norm", "weights", "gathered_weights", "optimizer"})


def judge_training(
    run: list[Evidence], ddp: list[Evidence], truth: Evidence, case: Case, *, routed: bool = True
) -> Verdict:
    """Judge a training run against truth and DDP, and DDP against truth: the third says who is wrong.

    With ``routed`` the case itself has to reach every expert from every rank.
    """
    verdict = Verdict.empty()
    verdict.add(check_batches(run))
    if routed:
        verdict.add(check_routing(truth))
    verdict.add(check_clipping(truth, case))
    oracles = judge_oracles(ddp, truth, case)
    verdict.add(oracles)
    verdict.add(check_initial(run, truth, case))
    verdict.add(check_training(run, truth, case, "truth"))
    if not oracles.findings:
        verdict.add(check_training(run, ddp[0], case, "ddp"))
    verdict.add(check_movement(run, truth, case))
    if case.layout.kind == "hsdp":
        verdict.add(check_replicas(run, case))
    return verdict


def judge_oracles(ddp: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """DDP has to agree with truth; where it does not, the kit, torch or the model is wrong, not the backend."""
    layout = replace(case.layout, kind="ddp", replicate=case.layout.world_size, shard=1)
    plain = replace(case, layout=layout, backend="ddp")
    verdict = check_training(ddp, truth, plain, "truth")
    verdict.add(check_replicas(ddp, plain))
    verdict.findings = [
        replace(finding, check=f"{ORACLE}{finding.check}", message=f"DDP disagrees with truth: {finding.message}")
        for finding in verdict.findings
    ]
    return verdict


def check_clipping(truth: Evidence, case: Case) -> Verdict:
    """Judge the case itself: where a bound is set, it is really active in truth."""
    verdict = Verdict.empty()
    for step, clipped in truth.facts["clipped"].items():
        bound = case.max_norm(int(step))
        if bound:
            verdict.expect(
                clipped,
                check="clipping",
                step=int(step),
                message=f"clipping at {bound} is not active: the norm is {truth.facts['norms'][step]:.4g}",
            )
    return verdict


def needs_fp64(verdict: Verdict, case: Case) -> bool:
    """Whether findings could be rounding."""
    return case.dtype == "float32" and any(base(finding) in NUMERIC for finding in verdict.findings)


def in_doubt(verdict: Verdict) -> tuple[bool, bool]:
    """Return whether a number of DDP's, and whether one of the run under test, is in doubt: fp64 decides each alone.

    Against truth: where both agree with it in fp64, they agree with each other.
    """
    names = [finding.check for finding in verdict.findings if base(finding) in NUMERIC]
    return any(name.startswith(ORACLE) for name in names), any(not name.startswith(ORACLE) for name in names)


def amplified(verdict: Verdict, found: Spread) -> list[Finding]:
    """Take findings that are or may be rounding out of ``verdict`` where the model amplifies it itself; return them.

    What may be rounding is held against the same step of truth: nothing else says that it is no error of logic.

    Args:
        found: how far truth's own numbers move when its weights do by a unit in the last place.
    """
    kept: list[Finding] = []
    harmless: list[Finding] = []
    for finding in verdict.findings:
        if finding.nature not in ("rounding", "undecided") or finding.max_rel_error is None:
            kept.append(finding)
            continue
        steps = found.get((base(finding), finding.parameter), {})
        known = max(steps.values(), default=0.0)
        if finding.nature == "undecided":
            known = steps.get(finding.step, 0.0)
        own = finding.max_rel_error <= AMPLIFICATION * known
        (harmless if own else kept).append(replace(finding, detail={**finding.detail, "spread": known}))
    verdict.findings = kept
    return harmless


def decide_rounding(verdict: Verdict, exact: Verdict, case: Case) -> list[Finding]:
    """Mark numeric findings as ``logic`` or ``rounding`` by the fp64 verdict; return those that are harmless.

    A finding is rounding where fp64 agrees; it is harmless where its size is also what the arithmetic of
    the dtype explains. Harmless findings are taken out of ``verdict``.
    """
    exact_findings = [finding for finding in exact.findings if base(finding) in NUMERIC]
    logic = {(base(finding), finding.parameter) for finding in exact_findings}
    any_logic = bool(exact_findings)
    kept: list[Finding] = []
    harmless: list[Finding] = []
    for finding in verdict.findings:
        if base(finding) not in NUMERIC:
            kept.append(finding)
            continue
        same = (base(finding), finding.parameter) in logic or any_logic
        marked = replace(finding, nature="logic" if same else "rounding")
        small = finding.max_rel_error is not None and finding.max_rel_error <= ROUNDING_CAP[case.dtype]
        (harmless if not same and small else kept).append(marked)
    verdict.findings = kept
    return harmless


def leave_undecided(verdict: Verdict, case: Case) -> None:
    """Mark numeric findings that rounding may explain as ``undecided``, for a model that does not run in fp64."""
    verdict.findings = [
        replace(finding, nature="undecided")
        if base(finding) in NUMERIC
        and finding.max_rel_error is not None
        and finding.max_rel_error <= ROUNDING_CAP[case.dtype]
        else finding
        for finding in verdict.findings
    ]


def base(finding: Finding) -> str:
    """Return the check's name without the oracle prefix."""
    return finding.check.removeprefix(ORACLE)
