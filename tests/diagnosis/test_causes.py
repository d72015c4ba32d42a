"""For each cause evidence made by hand that shows it, and evidence that nearly does."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.core.finding import Finding
from fsdp_testkit.diagnosis import CAUSES, Diagnosis, RunFacts, diagnose

TWO = RunFacts(world=2, shard=2)
FOUR = RunFacts(world=4, replicate=2, shard=2)
Q = "model.layers.0.self_attn.q_proj.weight"
Evidence = tuple[list[Finding], RunFacts, str]


def seen(*findings: Finding, run: RunFacts = TWO, report: str = "") -> Evidence:
    return list(findings), run, report


def found(check: str, message: str = "it differs", rank: int | None = 0, **fields: Any) -> Finding:
    return Finding(check=check, message=message, rank=rank, **fields)


def on_ranks(*ranks: int, check: str, **fields: Any) -> list[Finding]:
    return [found(check, rank=rank, **fields) for rank in ranks]


def training(first_bad: int | None, **facts: Any) -> RunFacts:
    return RunFacts(**{"world": 2, "shard": 2, "first_bad": first_bad, **facts})


def gradient(rank: int = 0, step: int = 0, parameter: str = Q, *, actual: str = "", **detail: Any) -> Finding:
    where: dict[str, Any] = {"rank": rank, "step": step, "parameter": parameter, "judged_by": "truth"}
    return found("gradients", actual=actual, detail=detail, **where)


def shares(*parts: float, rest: float = 1e-7, **fields: Any) -> Finding:
    return gradient(parts=list(parts), parts_rest=rest, **fields)


def loss(step: int, error: float = 0.1) -> Finding:
    return found("losses", step=step, judged_by="truth", max_rel_error=error)


def loaded(rank: int = 1, check: str = "initial_weights", **detail: Any) -> Finding:
    return found(check, f"{Q} differs", rank, parameter=Q, judged_by="truth", detail={"wrong": 1.0, **detail})


def buffer(rank: int = 1, **detail: Any) -> Finding:
    message = "buffer rotary.inv_freq differs from a freshly built model"
    return found("buffers", message, rank, parameter="rotary.inv_freq", detail={"wrong": 1.0, **detail})


def job(message: str, report: str = "") -> Evidence:
    return seen(found("ranks", message), report=report)


def allocated(rank: int, bytes_: int, gathered: int = 0) -> Finding:
    detail = {"allocated": bytes_, "gathered": gathered, "model_bytes": 1000, "shard_bytes": 500}
    return found("meta_init", f"the load allocated {bytes_} bytes", rank, detail=detail)


HANG = "no reply from ranks 0-1 of 2 within 9 s: rank 0 waits in all_reduce (a.py:1); rank 1 waits in {} (b.py:2)"
WEIGHTS = "the optimizer holds 1 tensors that are not the model's parameters"

#: cause -> (evidence that shows it, evidence that nearly does and shows another cause or none)
TABLE: dict[str, tuple[Evidence, Evidence]] = {
    "never reduced": (
        seen(shares(2.0, 0.0), shares(0.0, 2.0, rank=1), run=training(0)),
        # rank 1 takes part with a wrong weight
        seen(shares(2.0, 0.5), shares(0.5, 2.0, rank=1), run=training(0)),
    ),
    "reduced over the wrong group": (
        seen(shares(2.0, 2.0, 0.0, 0.0), run=training(0, world=4, replicate=2)),
        seen(shares(2.0, 2.0, 2.0, 2.0), run=training(0, world=4, replicate=2)),
    ),
    "wrong factor": (
        seen(shares(2.0, 2.0), run=training(0)),
        # the same factor, but it is the number of tokens of a step that divides by them
        seen(shares(27.5, 27.5, step=1), run=training(1, tokens={1: 27.5}, token_mean=(1,))),
    ),
    "wrong normaliser": (
        seen(shares(0.9, 1.1, step=1), run=training(1, tokens={1: 27.5}, token_mean=(1,))),
        # a factor that is no number of tokens
        seen(shares(0.5, 0.5, step=1), run=training(1, tokens={1: 27.5}, token_mean=(1,))),
    ),
    "gradient part lost": (
        seen(shares(0.0, 1.0, 0.0, 1.0), run=training(0)),
        # a whole rank is missing, not one of its micro-batches
        seen(shares(2.0, 2.0, 0.0, 0.0), run=training(0)),
    ),
    "norm of one rank": (
        seen(found("gradient_norm", step=0), run=training(None, norm_of_shards=True)),
        seen(found("gradient_norm", step=0), run=training(None)),
    ),
    "tie lost": (
        seen(found("ties", "a and b are no longer one object: the tie was lost"), gradient(rest=0.5), run=training(0)),
        seen(found("ties", "a and b became one object although the model does not tie them")),
    ),
    "buffer not filled": (
        seen(buffer(nonfinite=1.0)),
        seen(buffer(ratio=0.5, rest=0.0)),
    ),
    "buffer differs between ranks": (
        seen(buffer(ratio=0.5, rest=0.0)),
        # all ranks have the same wrong values: nobody filled it
        seen(buffer(rank=0, ratio=0.5, rest=0.0), buffer(rank=1, ratio=0.5, rest=0.0)),
    ),
    "weight not loaded": (
        seen(loaded(nonfinite=1.0)),
        seen(loaded(moved=1.0, rows=[0, 7], of=16)),
    ),
    "wrong slice": (
        seen(loaded(moved=1.0, rows=[8, 15], of=16)),
        seen(loaded(moved=0.0, rows=[8, 15], of=16)),
    ),
    "padded rows lost": (
        seen(loaded(rows=[16, 16], of=17, fill=0.0)),
        # the same rows of a tensor that divides evenly
        seen(loaded(rows=[15, 15], of=16, fill=0.0)),
    ),
    "replica diverged": (
        seen(*(loaded(rank=rank, ratio=0.1, rest=1.0) for rank in (2, 3)), run=FOUR),
        # both replicas are wrong
        seen(*(loaded(rank=rank, ratio=0.1, rest=1.0) for rank in range(4)), run=FOUR),
    ),
    "trained set changed": (
        seen(found("dtypes", f"{Q} has requires_grad=True", parameter=Q)),
        # the model is right, the optimizer's list is not
        seen(found("optimizer_binding", "parameter groups hold other parameters than asked for")),
    ),
    "optimizer on other tensors": (
        seen(found("optimizer_binding", WEIGHTS), found("movement", f"{Q} did not move in training", parameter=Q)),
        # it did not move because it has no gradient
        seen(
            gradient(actual="none"),
            found("movement", f"{Q} did not move in training", parameter=Q),
            run=training(0),
        ),
    ),
    "state not restored": (
        seen(found("resumed_optimizer", parameter=f"{Q}/exp_avg"), run=training(None, resumed_at=3)),
        # the first loss after resuming is wrong already
        seen(
            found("resumed_optimizer", parameter=f"{Q}/exp_avg"),
            found("resumed_losses", step=3),
            found("resumed_rng", "the torch generator is not where the uninterrupted run's is"),
            run=training(None, resumed_at=3),
        ),
    ),
    "RNG not restored": (
        seen(shares(0.5, 0.6, rest=0.7), run=training(0, dropout=True)),
        # no dropout: nothing random could differ
        seen(shares(0.5, 0.6, rest=0.7), run=training(0)),
    ),
    "forward reads other weights": (
        seen(loss(1), run=training(1, losses_as="initial weights")),
        # the weights did not move, so a forward has nothing new to see
        seen(loss(1), found("movement", f"{Q} did not move in training", parameter=Q), run=training(1)),
    ),
    "wrong dtype": (
        seen(found("dtypes", f"{Q} has dtype bfloat16", parameter=Q, expected="float32", actual="bfloat16")),
        # as large as a bf16 rounding, but only since the second step
        seen(loss(1, error=1e-3), run=training(1)),
    ),
    "key missing or extra in a file": (
        seen(found("files", "2 keys that a single-process save writes are missing: a, b", None)),
        seen(
            found("files", "a is stored as", None, expected="float32 [4]", actual="float64 [4]"),
        ),
    ),
    "not wrapped": (
        seen(found("structure", f"{Q} belongs to 0 FSDP units instead of exactly one", parameter=Q)),
        seen(found("structure", f"{Q} belongs to 2 FSDP units instead of exactly one", parameter=Q)),
    ),
    "wrapped twice": (
        seen(found("structure", f"{Q} belongs to 2 FSDP units instead of exactly one", parameter=Q)),
        seen(found("structure", f"{Q} belongs to 0 FSDP units instead of exactly one", parameter=Q)),
    ),
    "not resharded": (
        seen(found("reshard", f"after a forward {Q} is still gathered", parameter=Q)),
        seen(found("structure", "block model.layers.0 (Block) is not an FSDP unit of its own")),
    ),
    "memory held": (
        seen(allocated(1, 2500)),
        seen(allocated(0, 2500), allocated(1, 2500)),
    ),
    "switch without effect": (
        seen(allocated(0, 2500), allocated(1, 2500)),
        # it was gathered again from shards, so it had not been loaded whole
        seen(allocated(0, 2500, gathered=1000), allocated(1, 2500, gathered=1000)),
    ),
    "collective mismatch": (
        job(HANG.format("all_gather")),
        job(HANG.format("all_reduce")),
    ),
    "rank died": (
        job("rank 1 of 2 raised KeyError: 'lm_head.weight'"),
        job("rank 1 of 2 raised RuntimeError: aten.mm.default got mixed torch.Tensor and DTensor"),
    ),
    "rank stuck": (
        job("no reply from rank 0 of 2 within 9 s: rank 0 waits in all_gather (a.py:1); rank 1 had returned"),
        job(
            HANG.format("all_reduce"),
            "x\n\nrun again with DETAIL:\n  RuntimeError: Detected mismatch between collectives",
        ),
    ),
    "rounding only": (
        seen(*on_ranks(0, 1, check="gradients", nature="rounding", max_rel_error=4e-3, step=0)),
        seen(
            *on_ranks(0, check="gradients", nature="rounding", step=0),
            *on_ranks(1, check="gradients", nature="logic", step=0),
        ),
    ),
}  # fmt: skip


def first(evidence: Evidence) -> Diagnosis | None:
    findings, run, report = evidence
    return next(iter(diagnose(findings, run, report=report)), None)


def test_every_cause_is_in_the_table() -> None:
    assert TABLE.keys() == CAUSES.keys()


@pytest.mark.parametrize("cause", TABLE)
def test_evidence_shows_its_cause(cause: str) -> None:
    named = first(TABLE[cause][0])
    assert named is not None
    assert named.cause == cause
    assert named.text
    assert "{" not in named.text
    assert named.threads


@pytest.mark.parametrize("cause", TABLE)
def test_evidence_that_is_nearly_the_same_does_not(cause: str) -> None:
    named = first(TABLE[cause][1])
    assert named is None or named.cause != cause


@pytest.mark.parametrize(
    ("factor", "cause", "says"),
    [
        (27.5, "wrong normaliser", "sums were not divided"),
        (1 / 27.5, "wrong normaliser", "0.03636 x the expected in step 1, just one over the number of tokens"),
        (1 / 55, "wrong normaliser", "means were divided once more"),  # of both ranks
        (1 / 1000, "wrong factor", "0.001 x the expected"),
        (-1.0, "wrong factor", "-1 x the expected"),
    ],
)
def test_a_factor_has_a_cause_however_small(factor: float, cause: str, says: str) -> None:
    run = training(1, tokens={1: 27.5}, token_mean=(1,))
    named = first(seen(shares(factor, factor, step=1), shares(factor, factor, rank=1, step=1), run=run))
    assert named is not None
    assert named.cause == cause
    assert says in named.text


def test_a_gradient_of_zeros_is_no_factor() -> None:
    named = first(seen(shares(0.0, 0.0), run=training(0)))
    assert named is None


def test_what_the_kit_did_wrong_is_no_cause() -> None:
    wrong = "ranks with a spoilt gradient: [0, 1]"
    assert first(seen(found("guard", wrong, judged_by="kit"))) is None
    named = first(seen(found("guard", "the weights moved")))
    assert named is not None
    assert named.cause == "switch without effect"
