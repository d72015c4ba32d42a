"""What the rules look at: findings of a row, facts of its run, and the account of a job that failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fsdp_testkit.core.finding import Finding
from fsdp_testkit.diagnosis.seen import RunFacts

#: Checks whose findings are numbers of a training run.
NUMERIC = ("losses", "gradients", "gradient_norm", "weights", "gathered_weights", "optimizer")
#: A part of a gradient counts as missing below, and as there above, these multiples of its right share.
ABSENT, PRESENT = 0.02, 0.2
#: A factor below this is none: the gradient is zero.
NOTHING = 1e-9
#: Parts of a gradient are a multiple of the right ones where they agree within this share.
EVEN = 0.01
#: What is left of a gradient beside the ranks' own ones, where it is made of them: far above fp32's rounding.
REST = 5e-3
#: Relative error of a loss or gradient that a bf16 rounding somewhere in the forward explains.
BF16_ERROR = (1e-6, 5e-2)


@dataclass(frozen=True, slots=True)
class View:
    """A red row.

    Attributes:
        findings: what its checks found, and what other checks found over the same evidence.
        run: facts of its run.
        report: the account of a job that failed, or ``""``.
    """

    findings: tuple[Finding, ...]
    run: RunFacts
    report: str = ""

    def of(self, *checks: str) -> list[Finding]:
        """Return the findings of some checks."""
        return [finding for finding in self.findings if finding.check in checks]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that can be true of one finding: a predicate, and its words for the documentation."""

    words: str
    holds: Callable[[Finding, View], bool]


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that can be true of the findings that a rule picked, in their row."""

    words: str
    holds: Callable[[list[Finding], View], bool]


# marks: one finding


def _parts(finding: Finding) -> list[float]:
    parts: list[float] = finding.detail.get("parts", [])
    return parts if finding.detail.get("parts_rest", 1.0) < REST else []


def _by_rank(finding: Finding, view: View) -> list[list[float]]:
    """Return the parts [rank][micro-batch]; empty where there are none."""
    parts = _parts(finding)
    micro = len(parts) // view.run.world
    return [parts[rank * micro : (rank + 1) * micro] for rank in range(view.run.world)] if micro else []


def _own_only(finding: Finding, view: View) -> bool:
    groups = _by_rank(finding, view)
    return len(groups) > 1 and all(
        all(abs(part) > PRESENT for part in group) if rank == finding.rank else _absent(group)
        for rank, group in enumerate(groups)
    )


def _some_ranks_only(finding: Finding, view: View) -> bool:
    there = [rank for rank, group in enumerate(_by_rank(finding, view)) if not _absent(group)]
    return 1 < len(there) < view.run.world


def _micro_missing(finding: Finding, view: View) -> bool:
    groups = _by_rank(finding, view)
    return any(not _absent(group) and any(abs(part) < ABSENT for part in group) for group in groups if len(group) > 1)


def _absent(parts: list[float]) -> bool:
    return all(abs(part) < ABSENT for part in parts)


def factor(finding: Finding) -> float | None:
    """Return the constant by which a gradient is off, ``None`` where it is no multiple of the right one."""
    parts = _parts(finding)
    if parts:
        # however small, since a gradient that is divided once more by a number of tokens is
        middle = sum(parts) / len(parts)
        even = abs(middle) > NOTHING and all(abs(part - middle) < EVEN * abs(middle) for part in parts)
        return middle if even else None
    if finding.detail.get("parts") is None and finding.detail.get("rest", 1.0) < REST:
        ratio: float = finding.detail["ratio"]
        return ratio if abs(ratio) > NOTHING else None
    return None


def _multiple(finding: Finding, _: View) -> bool:
    found = factor(finding)
    return found is not None and abs(found - 1) > 2 * EVEN


def _uneven(finding: Finding, _: View) -> bool:
    parts = _parts(finding)
    clear = finding.detail.get("parts_rest", 1.0) < EVEN * REST  # a rounding leaves more, and is no weight
    return clear and bool(parts) and factor(finding) is None and all(part > PRESENT / 10 for part in parts)


def _counts(finding: Finding, view: View) -> tuple[float, ...]:
    """Return the numbers of tokens of the step: of a micro-batch, a rank and all; empty if it has no such mean."""
    mean = view.run.tokens.get(-1 if finding.step is None else finding.step)
    if not mean or finding.step not in view.run.token_mean:
        return ()
    micro = max(1, len(_parts(finding)) // view.run.world)
    return mean, mean * micro, mean * micro * view.run.world


def _tokens(finding: Finding, view: View) -> bool:
    found = factor(finding)
    return found is not None and any(abs(found / count - 1) < 2 * EVEN for count in _counts(finding, view))


def _per_token(finding: Finding, view: View) -> bool:
    found = factor(finding)
    return found is not None and any(abs(found * count - 1) < 2 * EVEN for count in _counts(finding, view))


def _as_unclipped(finding: Finding, view: View) -> bool:
    found, over = factor(finding), view.run.clipped.get(-1 if finding.step is None else finding.step)
    return found is not None and over is not None and abs(found / over - 1) < 2 * EVEN


def _shard_start(finding: Finding, view: View) -> int:
    rows = -(-int(finding.detail["of"]) // view.run.shard)
    return rows * ((finding.rank or 0) % view.run.shard)


def _last_rows(finding: Finding, view: View) -> bool:
    """Whether only rows at the very end are wrong, of a tensor that does not divide evenly."""
    detail, shard = finding.detail, view.run.shard
    if "of" not in detail or detail["of"] % max(1, shard) == 0 or detail["rows"][1] != detail["of"] - 1:
        return False
    start = _shard_start(finding, view)
    return bool(detail["rows"][0] > start or detail["of"] - start == 1)


def _all_but_first_rows(finding: Finding, view: View) -> bool:
    """Whether, in one process, the wrong rows are just those of the shards after the first."""
    detail, shard = finding.detail, view.run.shard
    alone = "from_pretrained" in finding.judged_by
    return alone and shard > 1 and "of" in detail and detail["rows"] == [-(-detail["of"] // shard), detail["of"] - 1]


def _whole_model(finding: Finding, _: View) -> bool:
    """Whether a load did at least what loading the whole model takes, without gathering it from other ranks."""
    detail = finding.detail
    size, gathered = detail.get("model_bytes", 0), detail.get("gathered", 0)
    own = detail.get("allocated", 0) - detail.get("shard_bytes", 0)
    return bool(2 * gathered < size and (own >= size or detail.get("init_elements", 0) * 4 >= size))


def _size_of_bf16(finding: Finding, _: View) -> bool:
    error = finding.max_rel_error
    return error is not None and BF16_ERROR[0] <= error <= BF16_ERROR[1]


def _lost_values(finding: Finding) -> bool:
    detail = finding.detail
    return detail.get("nonfinite", 0) > 0 or "fill" in detail or detail.get("ratio", 1) > 1e6


def _differs(finding: Finding, pattern: str) -> bool:
    ours, theirs = re.search(pattern, finding.actual), re.search(pattern, finding.expected)
    return ours is not None and theirs is not None and ours.group() != theirs.group()


MARKS: dict[str, Mark] = {
    "own data": Mark("the gradient is made of the rank's own data alone", _own_only),
    "some ranks": Mark("the gradient is made of the data of some ranks only", _some_ranks_only),
    "micro-batch missing": Mark("the gradient lacks a micro-batch", _micro_missing),
    "multiple": Mark("each rank's and micro-batch's share is off by the same factor", _multiple),
    "uneven": Mark("ranks or micro-batches have other shares than they should, each a different one", _uneven),
    "tokens": Mark("the factor is a number of tokens of that step: of a micro-batch, a rank or all", _tokens),
    "per token": Mark("the factor is one over a number of tokens of that step", _per_token),
    "unclipped": Mark("the factor is the norm over its bound: as if nothing were clipped", _as_unclipped),
    "another's": Mark("the gradient is the right one of another parameter", lambda f, _: "is_other" in f.detail),
    "mixture": Mark(
        "the gradient is no mixture of the ranks' own ones", lambda f, _: f.detail.get("parts_rest", 0.0) >= REST
    ),
    "none": Mark(
        "there is no gradient where one is due, or one of zeros",
        lambda f, _: f.actual == "none" or f.detail.get("fill") == 0.0,
    ),
    "lost": Mark("NaN, one constant, or huge values", lambda f, _: _lost_values(f)),
    "moved": Mark("rows that lie elsewhere in the same tensor", lambda f, _: f.detail.get("moved", 0.0) >= 0.5),
    "last rows": Mark("only rows at the end of a tensor that does not divide evenly", _last_rows),
    "other shards": Mark("in one process, all rows but those of the first shard", _all_but_first_rows),
    "bf16": Mark("the right values, rounded to bf16", lambda f, _: "bf16" in f.detail),
    "dtype": Mark("another dtype than declared", lambda f, _: _differs(f, r"^(b?float|u?int|bool|complex)\w*")),
    "whole model": Mark("as much as loading the whole model takes", _whole_model),
    "size of bf16": Mark("an error as large as a rounding to bf16 gives", _size_of_bf16),
    "uneven tensor": Mark(
        "of a tensor that does not divide evenly", lambda f, v: _dim(f.expected) % max(1, v.run.shard) != 0
    ),
    "two axes": Mark("where a mesh of two axes was asked for", lambda f, _: f.expected.count(",") > 1),
}


def _dim(shape: str) -> int:
    match = re.match(r"\[(\d+)", shape)
    return int(match.group(1)) if match else 0


# signs: the findings that a rule picked


def _ranks(findings: Iterable[Finding]) -> set[int]:
    return {finding.rank for finding in findings if finding.rank is not None}


def _one_replica(picked: list[Finding], view: View) -> bool:
    replicas = {rank // view.run.shard for rank in _ranks(picked)}
    return view.run.replicate > 1 and 0 < len(replicas) < view.run.replicate


def _only_rounding(picked: list[Finding], view: View) -> bool:
    return bool(picked) and all(finding.nature == "rounding" for finding in view.of(*NUMERIC))


def _before_anything(picked: list[Finding], view: View) -> bool:
    first = min(finding.step or 0 for finding in picked)
    return view.run.first_bad is None or first < view.run.first_bad


def _losses_at_first(view: View) -> list[Finding]:
    return [finding for finding in view.of("losses") if finding.step == view.run.first_bad]


def _all_at_first(picked: list[Finding], view: View) -> bool:
    check, first = picked[0].check, view.run.first_bad
    mine = [f for f in view.of(check) if f.step == first and f.judged_by == "truth"]
    return len([finding for finding in picked if finding.step == first]) == len(mine)


def _later_only(_: list[Finding], view: View) -> bool:
    """Whether the first step was right in all and what came after is not, with weights that did move."""
    held = view.of("movement", "optimizer_binding", "learning_rate", "initial_weights")
    return bool(view.run.first_bad) and bool(_losses_at_first(view)) and not held


def _first_resumed_right(_: list[Finding], view: View) -> bool:
    wrong = view.of("resumed_losses", "resumed_norms", "resumed_gradients")
    return view.run.resumed_at is not None and all(finding.step != view.run.resumed_at for finding in wrong)


def _different_collectives(picked: list[Finding], _: View) -> bool:
    return any(len(set(re.findall(r"waits in (\w+)", finding.message))) > 1 for finding in picked)


def _all_of_check(picked: list[Finding], view: View) -> bool:
    return len(picked) == len(view.of(*{finding.check for finding in picked}))


SIGNS: dict[str, Sign] = {
    "some ranks": Sign("on some ranks only", lambda p, v: 0 < len(_ranks(p)) < v.run.world),
    "every rank": Sign("on every rank", lambda p, v: len(_ranks(p)) == v.run.world),
    "one replica": Sign("in some replicas only, while another one is right", _one_replica),
    "all": Sign("and this holds for all findings of the check", _all_of_check),
    "all at first": Sign("and this holds for all findings of the check at the first wrong step", _all_at_first),
    "rounding": Sign("in fp64 the runs agree", _only_rounding),
    "before": Sign("before any loss or gradient is wrong", _before_anything),
    "later": Sign("the first step is right, the weights move, and later losses are wrong", _later_only),
    "first step": Sign("from the first step on", lambda _, v: v.run.first_bad == 0),
    "losses right": Sign("the losses of that step are right", lambda _, v: not _losses_at_first(v)),
    "dropout": Sign("dropout is on", lambda _, v: v.run.dropout),
    "weights right": Sign("the loaded weights are right", lambda _, v: not v.of("initial_weights")),
    "as initial": Sign(
        "the losses are those of the initial weights", lambda _, v: v.run.losses_as == "initial weights"
    ),
    "as first": Sign(
        "the losses are those of the first step's random numbers",
        lambda _, v: v.run.losses_as == "first random numbers",
    ),
    "norm of shards": Sign("each rank's norm is that of its shards alone", lambda _, v: v.run.norm_of_shards),
    "different collectives": Sign("the ranks wait in different collectives", _different_collectives),
    "random numbers": Sign("random numbers are not restored", lambda _, v: bool(v.of("resumed_rng"))),
    "first resumed right": Sign("the first losses after resuming are right", _first_resumed_right),
}
