"""Facts of a whole run that no single finding holds. Plain data; see `RunFacts`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence

#: Two losses are the same where they differ by no more than this share: far below what one step changes.
SAME = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known of the run that a row judged.

    Attributes:
        world, replicate, shard: numbers of ranks.
        dtype: of the parameters.
        dropout: whether random numbers matter.
        first_bad: the first step with a wrong loss or gradient, ``None`` where there is none.
        losses_as: ``initial weights`` or ``first random numbers`` where the losses of that step are those that
            these would give, else ``""``.
        tokens: mean number of valid tokens per rank and micro-batch, by step.
        token_mean: steps whose normaliser is the number of tokens.
        clipped: step -> norm over bound, of the steps whose gradients have to be clipped.
        norm_of_shards: whether the ranks' norms are those of their shards: the root of the sum of their squares is
            the right norm.
        resumed_at: the first step after a resume, ``None`` where nothing was resumed.
    """

    world: int = 1
    replicate: int = 1
    shard: int = 1
    dtype: str = "float32"
    dropout: bool = False
    first_bad: int | None = None
    losses_as: str = ""
    tokens: dict[int, float] = field(default_factory=dict)
    token_mean: tuple[int, ...] = ()
    clipped: dict[int, float] = field(default_factory=dict)
    norm_of_shards: bool = False
    resumed_at: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def of_case(case: Case | None) -> RunFacts:
    """Return what the case alone says."""
    if case is None:
        return RunFacts()
    layout = case.layout
    return RunFacts(
        world=layout.world_size,
        replicate=layout.replicate,
        shard=layout.shard,
        dtype=case.dtype,
        dropout=case.model.dropout > 0,
    )


def of_run(case: Case, run: list[Evidence], truth: Evidence, parts: Evidence | None, first_bad: int | None) -> RunFacts:
    """Return what a training run shows beside truth.

    Args:
        case: what was run.
        run: evidence of all ranks.
        truth: truth's evidence.
        parts: evidence of `fsdp_testkit.scenarios.parts` for step ``first_bad``, if it was made.
        first_bad: the first step with a wrong loss or gradient.
    """
    steps = [int(key) for key in truth.facts["tokens"] if all(key in evidence.facts["norms"] for evidence in run)]
    return replace(
        of_case(case),
        first_bad=first_bad,
        losses_as=_losses_as(run, parts) if parts is not None else "",
        tokens={step: _mean(truth.facts["tokens"][str(step)]) for step in steps},
        token_mean=tuple(step for step in steps if case.normaliser(step) == "token_mean"),
        clipped={
            step: truth.facts["norms"][str(step)] / case.max_norm(step)
            for step in steps
            if truth.facts["clipped"][str(step)]
        },
        norm_of_shards=any(_norm_of_shards(case, run, truth, step) for step in steps),
        resumed_at=case.steps // 2 if case.scenario == "resume" else None,
    )


def _losses(run: list[Evidence], step: int) -> list[list[float]]:
    return [evidence.facts["losses"][str(step)] for evidence in run]


def _same(left: list[list[float]], right: list[list[float]]) -> bool:
    pairs = [(a, b) for ours, theirs in zip(left, right, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return all(math.isclose(a, b, rel_tol=SAME) for a, b in pairs)


def _losses_as(run: list[Evidence], parts: Evidence) -> str:
    found, right = _losses(run, parts.facts["step"]), parts.facts["losses"]
    for key, words in (("with_initial_weights", "initial weights"), ("with_first_random", "first random numbers")):
        other = parts.facts.get(key)
        if other is not None and not _same(found, right) and not _same(other, right) and _same(found, other):
            return words
    return ""


def _norm_of_shards(case: Case, run: list[Evidence], truth: Evidence, step: int) -> bool:
    wanted = truth.facts["norms"][str(step)]
    norms = [evidence.facts["norms"][str(step)] for evidence in run]
    if case.layout.shard < 2 or any(math.isclose(norm, wanted, rel_tol=1e-3) for norm in norms):
        return False
    return math.isclose(math.sqrt(sum(norm**2 for norm in norms[: case.layout.shard])), wanted, rel_tol=1e-4)


def _mean(groups: list[list[int]]) -> float:
    flat = [number for group in groups for number in group]
    return sum(flat) / len(flat) if flat else 0.0
