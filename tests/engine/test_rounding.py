"""Rounding only is reported and does not fail; rounding to a dtype that nobody asked for does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsdp_testkit.checks.tolerances import NUDGES, ROUNDING_CAP, tolerance
from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Finding, Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.core.result import Result
from fsdp_testkit.engine.engine import Engine
from fsdp_testkit.engine.judge import amplified, decide_rounding, in_doubt, leave_undecided
from fsdp_testkit.engine.outcome import Outcome
from fsdp_testkit.engine.tests import settle
from fsdp_testkit.engine.work import OracleFailedError
from fsdp_testkit.faults.rounding import HalfPrecision, OtherOrderOfSums
from fsdp_testkit.reporting.matrix import total_lines

CASE = Case(model=ModelSpec(model_type="llama"), layout=Layout(kind="fsdp", shard=2))
CAP = ROUNDING_CAP["float32"]


def finding(error: float, check: str = "gradients", parameter: str = "head") -> Finding:
    return Finding(check=check, message="differs", parameter=parameter, max_rel_error=error)


@pytest.mark.parametrize(
    ("error", "exact", "nature", "fails"),
    [
        (CAP / 2, [], "rounding", False),
        (CAP * 2, [], "rounding", True),
        (CAP / 2, [finding(1e-3)], "logic", True),
        (CAP / 2, [finding(1e-3, parameter="embedding")], "logic", True),
        (CAP / 2, [finding(1e-3, check="structure")], "rounding", False),
    ],
)
def test_decision(error: float, exact: list[Finding], nature: str, fails: bool) -> None:
    verdict = Verdict(findings=[finding(error), finding(error, check="structure")])
    harmless = decide_rounding(verdict, Verdict(findings=exact), CASE)
    kept = [item for item in verdict.findings if item.check == "gradients"]
    assert [item.nature for item in (kept if fails else harmless)] == [nature]
    assert not (harmless if fails else kept)
    assert [item.nature for item in verdict.findings if item.check == "structure"] == [""]


@pytest.mark.parametrize(
    ("error", "spread", "nature", "fails"),
    [
        (34.0, 5.0, "rounding", False),
        (34.0, 1.0, "rounding", True),
        (34.0, 0.0, "rounding", True),
        (34.0, 5.0, "logic", True),
    ],
)
def test_what_the_model_amplifies_by_itself(error: float, spread: float, nature: str, fails: bool) -> None:
    marked = [replace(finding(error, check), nature=nature) for check in ("gradients", "oracle_gradients")]
    verdict = Verdict(findings=[*marked, finding(error, check="structure")])
    harmless = amplified(verdict, {("gradients", "head"): {0: 0.0, 4: spread}})
    assert len(harmless) == (0 if fails else 2)
    assert [item.check for item in verdict.findings][-1] == "structure"
    assert len(verdict.findings) == (3 if fails else 1)


@pytest.mark.parametrize(
    ("error", "spread", "fails"), [(CAP / 2, CAP, False), (CAP / 2, 0.0, True), (CAP * 2, CAP, True)]
)
def test_what_fp64_cannot_decide(error: float, spread: float, fails: bool) -> None:
    verdict = Verdict(findings=[finding(error), finding(error, check="structure")])
    leave_undecided(verdict, CASE)
    assert [item.nature for item in verdict.findings] == ["undecided" if error <= CAP else "", ""]
    verdict.findings = [replace(item, step=3) for item in verdict.findings]
    # of another step truth's spread says nothing
    assert amplified(Verdict(findings=list(verdict.findings)), {("gradients", "head"): {4: spread}}) == []
    harmless = amplified(verdict, {("gradients", "head"): {3: spread}})
    assert len(harmless) == (not fails)
    assert len(verdict.findings) == 1 + fails


class FakeWork:
    """Truth that runs in fp64 or does not."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.nudged: list[Case] = []

    def truth(self, case: Case) -> Evidence:
        if case.dtype == "float64" and not self.exact:
            raise OracleFailedError("truth could not be computed: float != double\nand its report")
        return Evidence(rank=0, facts={"losses": {"3": 1.0}, "norms": {"3": 1.0}})

    def prepare(self, cases: list[Case]) -> None:
        self.nudged += cases


def test_a_failure_under_fp64_is_no_excuse_where_truth_runs() -> None:
    for exact in (True, False):
        work, outcome = FakeWork(exact), Outcome(verdict=Verdict(findings=[finding(CAP / 2)]))
        settle(outcome, work, CASE, lambda _: "rank 1 died")  # type: ignore[arg-type]
        assert len(outcome.verdict.findings) == 1  # truth has no spread here
        if exact:
            assert outcome.extra == {"fp64_failure": "rank 1 died"}
            assert outcome.verdict.findings[0].nature == ""
            assert not work.nudged
        else:
            assert outcome.extra == {"no_fp64": "truth could not be computed: float != double"}
            assert outcome.verdict.findings[0].nature == "undecided"
            assert len(work.nudged) == NUDGES


def test_the_cap_lies_between_fp32_and_narrower_formats() -> None:
    half = 2.0**-11  # half a unit in the last place of fp16 and TF32
    bounds = tolerance("float32", "cpu")
    assert max(bounds.gradient, bounds.weight, bounds.optimizer) < CAP < half / 2


def run(engine: Engine, fault: type) -> Result:
    armed = engine.armed(f"{fault.__module__}:{fault.__qualname__}")
    (row,) = armed.run_test(ModelSpec(model_type="llama"), "auto_vs_ddp", "untied")
    assert row.extra["fault_hits"] > 0
    return row


@pytest.mark.parametrize(
    ("checks", "doubt"),
    [
        (["gradients"], (False, True)),
        (["oracle_gradients", "structure"], (True, False)),
        (["oracle_losses", "weights"], (True, True)),
        (["structure", "oracle_replicas"], (False, False)),
    ],
)
def test_whose_numbers_are_in_doubt(checks: list[str], doubt: tuple[bool, bool]) -> None:
    assert in_doubt(Verdict(findings=[finding(CAP / 2, check) for check in checks])) == doubt


def test_another_order_of_sums_is_reported_and_passes(engine: Engine) -> None:
    row = run(engine, OtherOrderOfSums)
    (work,) = (work for spec, work in engine._works.items() if spec.tie is False)
    again = [Case.from_json(key.split(" ", 1)[1]) for key in work._runs if "float64" in key]
    # DDP agreed with truth in fp32: nothing of it is in doubt
    assert [case.backend for case in again] == ["reference"]
    assert (row.outcome, row.findings) == ("passed", [])
    assert {item["nature"] for item in row.extra["rounding"]} == {"rounding"}
    text = ["".join(segment.text for segment in line) for line in total_lines([row])]
    assert any("rounding only" in line for line in text)


def test_rounding_to_a_narrower_dtype_fails(engine: Engine) -> None:
    row = run(engine, HalfPrecision)
    wrong = [item for item in row.findings if item["check"] == "gradients"]
    assert row.outcome == "failed"
    assert {item["nature"] for item in wrong} == {"rounding"}
    assert max(item["max_rel_error"] for item in wrong) < 2.0**-11
