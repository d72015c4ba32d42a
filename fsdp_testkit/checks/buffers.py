"""Buffers and dtypes: bit-equal on all ranks and to a freshly built model."""

from __future__ import annotations

from dataclasses import replace

from fsdp_testkit.checks.compare import same_bits
from fsdp_testkit.checks.signature import signature
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Verdict


def check_buffers(evidences: list[Evidence], truth: Evidence) -> Verdict:
    """Judge every buffer, persistent or not, against the model that the kit built in memory.

    Equality between ranks is not enough (all ranks can hold the same zeros), equality on rank 0 neither.
    """
    verdict = Verdict.empty()
    wanted = truth.facts["buffers"]
    for evidence in evidences:
        found = evidence.facts["buffers"]
        rank = evidence.rank
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        verdict.expect(
            not missing and not extra,
            check="buffers",
            rank=rank,
            message=f"buffer names changed: missing {missing[:5]}, extra {extra[:5]}",
            judged_by="truth",
        )
        for name in wanted.keys() & found.keys():
            where = {"check": "buffers", "rank": rank, "parameter": name, "judged_by": "truth"}
            facts = found[name]
            if not verdict.expect(not facts["meta"], message=f"buffer {name} is still on the meta device", **where):
                continue
            verdict.expect(
                facts["persistent"] == wanted[name]["persistent"],
                message=f"buffer {name} has persistent={facts['persistent']}",
                **where,
            )
            verdict.expect(
                facts["dtype"] == wanted[name]["dtype"],
                message=f"buffer {name} has dtype {facts['dtype']} instead of {wanted[name]['dtype']}",
                expected=wanted[name]["dtype"],
                actual=facts["dtype"],
                **where,
            )
            actual, expected = evidence.tensors[f"buffer/{name}"], truth.tensors[f"buffer/{name}"]
            verdict.tensors += 1
            others = [other for other in evidences if other.rank != rank]
            alone = bool(others) and all(
                f"buffer/{name}" in other.tensors and same_bits(other.tensors[f"buffer/{name}"], expected)
                for other in others
            )
            verdict.expect(
                same_bits(actual, expected),
                message=f"buffer {name} differs from a freshly built model"
                + (", on this rank only" if alone else "")
                + (": never filled, wrong or of another dtype"),
                expected=_sample(expected.array().reshape(-1)),
                actual=_sample(actual.array().reshape(-1)),
                **where,
            )
            _how(verdict, actual, expected)
    return verdict


def _how(verdict: Verdict, actual: TensorData, expected: TensorData) -> None:
    """Say in the finding that was just made, if any, how the values are wrong."""
    if not same_bits(actual, expected) and actual.shape == expected.shape:
        detail = signature(actual.array(), expected.array())
        verdict.findings[-1] = replace(verdict.findings[-1], detail=detail)


def check_dtypes(evidences: list[Evidence], truth: Evidence) -> Verdict:
    """Judge dtype and ``requires_grad`` of every parameter, fp32-kept modules included."""
    verdict = Verdict.empty()
    wanted = truth.facts["parameters"]
    for evidence in evidences:
        for name, facts in evidence.facts["parameters"].items():
            if name not in wanted:
                continue  # names are judged by the structure check
            where = {"check": "dtypes", "rank": evidence.rank, "parameter": name, "judged_by": "truth"}
            verdict.expect(
                facts["dtype"] == wanted[name]["dtype"],
                message=f"{name} has dtype {facts['dtype']} instead of {wanted[name]['dtype']}",
                expected=wanted[name]["dtype"],
                actual=facts["dtype"],
                **where,
            )
            verdict.expect(
                facts["requires_grad"] == wanted[name]["requires_grad"],
                message=f"{name} has requires_grad={facts['requires_grad']}",
                **where,
            )
    return verdict


def _sample(values: object) -> str:
    array = list(values)[:4] if hasattr(values, "__iter__") else []
    return "[" + ", ".join(f"{float(item):.6g}" for item in array) + (", ...]" if len(array) == 4 else "]")
