"""Steps that have to be refused: a gradient that is not finite must move nothing, on any rank."""

from __future__ import annotations

from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict


def check_guard(evidences: list[Evidence]) -> Verdict:
    """Judge that all ranks refused a step in which one rank's shard of the gradient held NaN."""
    verdict = Verdict.empty()
    facts = {evidence.rank: evidence.facts["guard"] for evidence in evidences}
    poisoned = [rank for rank, seen in facts.items() if seen["poisoned"]]
    verdict.expect(
        len(poisoned) == 1, check="guard", judged_by="kit", message=f"ranks with a spoilt gradient: {poisoned}"
    )
    for rank, seen in facts.items():
        refused = seen["refused"]
        verdict.expect(
            refused.startswith("step 1: "),
            check="guard",
            rank=rank,
            step=1,
            message=f"a gradient that is not finite on ranks {poisoned} was not refused on this rank, "
            f"though the case asks for it (refuse_nonfinite)",
            expected="an error before the optimizer's step",
            actual=refused or "no error",
        )
        verdict.expect(
            not seen["changed"],
            check="guard",
            rank=rank,
            step=1,
            parameter=seen["changed"][0] if seen["changed"] else "",
            message=f"{len(seen['changed'])} weights moved in a step with a gradient that is not finite",
            expected="no weight moves",
        )
    return verdict
