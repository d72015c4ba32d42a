"""Which parts a wrong gradient is made of: whose data, with which weight. For the diagnosis of red runs only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import expected_part, shard_dim
from fsdp_testkit.checks.signature import CLOSE
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Array, Evidence
from fsdp_testkit.core.finding import Finding

#: Singular values below this share of the largest one are taken for nothing: the parts look alike.
CONDITION = 1e-4


def first_bad_step(findings: list[Finding]) -> int | None:
    """Return the first step in which a loss or a gradient is wrong, ``None`` where all are right."""
    steps = [f.step for f in findings if f.check in ("losses", "gradients") and f.step is not None]
    return min(steps, default=None)


def explain_gradients(
    findings: list[Finding], run: list[Evidence], truth: Evidence, parts: Evidence, case: Case, step: int
) -> list[Finding]:
    """Return the findings; those of gradients at ``step`` against truth say in ``detail`` what they are made of.

    Added: ``parts``, for each rank and micro-batch (rank-major) how much of its own gradient is in there, as a
    multiple of what should be; ``parts_rest``, what is left beside, relative; ``is_other``, the name of the
    parameter whose right gradient this one equals.
    """
    by_rank = {evidence.rank: evidence for evidence in run}
    shares = expected_shares(truth, case, step)

    def explained(finding: Finding) -> Finding:
        key = f"gradient/{step}/{finding.parameter}"
        evidence = by_rank[finding.rank or 0]
        mine = finding.check == "gradients" and finding.step == step and finding.judged_by == "truth"
        if not mine or key not in evidence.tensors or key not in truth.tensors:
            return finding
        detail = finding.detail | _made_of(finding.parameter, evidence, parts, case, shares)
        if detail.get("parts_rest", 1.0) > CLOSE and (other := _other(key, evidence, truth, case)):
            detail["is_other"] = other
        return replace(finding, detail=detail)

    return [explained(finding) for finding in findings]


def expected_shares(truth: Evidence, case: Case, step: int) -> list[float]:
    """Return the weight that each rank's and micro-batch's mean-loss gradient has in the step's, rank-major."""
    tokens: list[list[int]] = truth.facts["tokens"][str(step)]
    total, count = sum(map(sum, tokens)), sum(map(len, tokens))
    even = case.normaliser(step) == "rank_mean"
    norm, bound = truth.facts["norms"][str(step)], case.max_norm(step)
    scale = min(1.0, bound / (norm + 1e-6)) if bound else 1.0
    return [scale * (1 / count if even else number / total) for group in tokens for number in group]


def _made_of(name: str, evidence: Evidence, parts: Evidence, case: Case, shares: list[float]) -> dict[str, Any]:
    actual = evidence.tensors[f"gradient/{_step(parts)}/{name}"].array().astype(np.float64).reshape(-1)
    columns = []
    for rank in range(case.layout.world_size):
        for micro in range(case.micro_batches):
            tensor = parts.tensors.get(f"part/{rank}/{micro}/{name}")
            if tensor is None:
                return {}
            columns.append(_rows(tensor.array(), evidence, name, case).reshape(-1))
    matrix = np.stack(columns, axis=1).astype(np.float64)
    size = float(np.linalg.norm(matrix @ np.asarray(shares)))
    if not size or not np.isfinite(actual).all() or actual.shape != matrix.shape[:1]:
        return {}
    found, _, rank_of, _ = np.linalg.lstsq(matrix, actual, rcond=CONDITION)
    if rank_of < len(columns):
        return {}
    rest = float(np.linalg.norm(actual - matrix @ found)) / max(size, float(np.linalg.norm(actual)))
    ratios = [float(f"{value / share:.4g}") for value, share in zip(found, shares, strict=True)]
    return {"parts": ratios, "parts_rest": float(f"{rest:.4g}")}


def _step(parts: Evidence) -> int:
    step: int = parts.facts["step"]
    return step


def _rows(full: Array, evidence: Evidence, name: str, case: Case) -> Array:
    facts = evidence.facts["parameters"].get(name, {})
    if not facts.get("dtensor", False):
        return full
    return expected_part(full, case.layout, evidence.rank, shard_dim(facts))


def _other(key: str, evidence: Evidence, truth: Evidence, case: Case) -> str:
    """Return the parameter whose right gradient stands where that of ``key`` should, or ``""``."""
    prefix = key.rpartition("/")[0] + "/"
    actual = evidence.tensors[key].array()
    for name, tensor in truth.under(prefix):
        if f"{prefix}{name}" == key:
            continue
        part = _rows(tensor.array(), evidence, name, case)
        if part.shape == actual.shape and part.size > 1 and np.any(part):
            scale = float(np.abs(part).max())
            if float(np.abs(actual - part).max()) <= CLOSE * scale:
                return name
    return ""
