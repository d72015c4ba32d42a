"""Resume: the second half of a resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

from typing import Any

from fsdp_testkit.checks.compare import compare, same_bits
from fsdp_testkit.checks.tolerances import tolerance
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict


def check_resume(whole: list[Evidence], resumed: list[Evidence], case: Case, first: int) -> Verdict:
    """Compare each rank's trace from step ``first`` on with the uninterrupted one, and the restored state."""
    verdict = Verdict.empty()
    for before, after in zip(whole, resumed, strict=True):
        rank = after.rank
        for step in range(first, case.steps):
            key = str(step)
            where: dict[str, Any] = {"rank": rank, "step": step, "judged_by": "uninterrupted"}
            for name, label in (
                ("losses", "losses"),
                ("norms", "gradient norm"),
                ("lrs", "learning rates"),
                ("batches", "batches"),
            ):
                verdict.expect(
                    before.facts[name][key] == after.facts[name][key],
                    check=f"resumed_{name}",
                    message=f"{label} after resuming differ from the uninterrupted run",
                    expected=str(before.facts[name][key]),
                    actual=str(after.facts[name][key]),
                    **where,
                )
            _tensors(verdict, before, after, f"gradient/{step}/", "resumed_gradients", where, case)
        end: dict[str, Any] = {"rank": rank, "judged_by": "uninterrupted"}
        for source, drawn in before.facts["draws"].items():
            verdict.expect(
                after.facts["draws"][source] == drawn,
                check="resumed_rng",
                message=f"after resuming, the {source} generator is not where the uninterrupted run's is",
                expected=str(drawn),
                actual=str(after.facts["draws"][source]),
                **end,
            )
        _tensors(verdict, before, after, "final/", "resumed_weights", end, case)
        _tensors(verdict, before, after, "optimizer/", "resumed_optimizer", end, case)
        _restored(verdict, before, after, first)
    return verdict


def _tensors(
    verdict: Verdict, before: Evidence, after: Evidence, prefix: str, check: str, where: dict[str, Any], case: Case
) -> None:
    names = {name for name, _ in before.under(prefix)}
    others = {name for name, _ in after.under(prefix)}
    for name in sorted(names ^ others):
        verdict.expect(
            False, check=check, parameter=name, message=f"{prefix}{name} is in one of the two runs only", **where
        )
    limit = tolerance(case.dtype, case.layout.device).weight if case.layout.device == "cuda" else 0.0
    for name in names & others:
        left, right = after.tensors[f"{prefix}{name}"], before.tensors[f"{prefix}{name}"]
        if same_bits(left, right):
            verdict.checks += 1
            verdict.tensors += 1
            continue
        compare(verdict, left, right.array(), tolerance=limit, check=check, parameter=name, **where)


def _restored(verdict: Verdict, before: Evidence, after: Evidence, first: int) -> None:
    """Right after loading, each trained parameter has its optimizer state, with as many steps as were done."""
    found = after.facts["restored"]
    where: dict[str, Any] = {"check": "restored_optimizer", "rank": after.rank, "judged_by": "uninterrupted"}
    for name, scalars in before.facts["optimizer"]["scalars"].items():
        verdict.expect(
            found["scalars"].get(name, {}).get("step") == (float(first) if "step" in scalars else None),
            parameter=name,
            message=f"optimizer state of {name} was not restored: {found['scalars'].get(name)}",
            expected=f"step={first}",
            actual=str(found["scalars"].get(name)),
            **where,
        )
    wanted = {name for name, _ in before.under("optimizer/")}
    restored = {name for name, _ in after.under("restored/")}
    missing = sorted(wanted - restored)
    verdict.expect(
        not missing,
        message=f"optimizer tensors were not restored: {missing[:4]}",
        expected=f"{len(wanted)} tensors",
        actual=f"{len(restored)} tensors",
        **where,
    )
