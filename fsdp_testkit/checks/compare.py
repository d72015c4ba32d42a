"""Comparing what a rank holds with the part of the whole that it should hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fsdp_testkit.checks.signature import CLOSE, multiple, signature
from fsdp_testkit.core.evidence import Array, TensorData
from fsdp_testkit.core.finding import Finding, Verdict
from fsdp_testkit.core.layout import Layout


def chunk_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return [start, stop) of chunk ``index`` by the rule of ``torch.chunk``: ceil(size / parts) rows each.

    Late chunks may be shorter or empty.
    """
    rows = math.ceil(size / parts) if size else 0
    return min(index * rows, size), min((index + 1) * rows, size)


def expected_part(full: Array, layout: Layout, rank: int, dim: int = 0) -> Array:
    """Return the rows of ``full`` that ``rank`` must hold: FSDP shards ``dim`` over the shard axis."""
    if layout.kind in ("single", "ddp"):
        return full
    start, stop = chunk_bounds(full.shape[dim], layout.shard, layout.coordinate(rank)[-1])
    return full[(slice(None),) * dim + (slice(start, stop),)]


def first_row(full: Array, layout: Layout, rank: int, dim: int = 0) -> int:
    """Return the index in dim 0 of ``full`` at which the part of ``rank`` starts (0 where it is cut elsewhere)."""
    if layout.kind in ("single", "ddp") or dim:
        return 0
    return chunk_bounds(full.shape[0], layout.shard, layout.coordinate(rank)[-1])[0]


def shard_dim(facts: dict[str, Any]) -> int:
    """Return the tensor dim that the parameter is sharded on (0 where it is not)."""
    for placement in facts.get("placements", []):
        if placement.startswith("S"):
            return int(placement[1:])
    return 0


def compare(
    verdict: Verdict,
    actual: TensorData,
    expected: Array,
    *,
    tolerance: float,
    scale: Callable[[], float] | None = None,
    full: Array | None = None,
    first: int = 0,
    **where: Any,
) -> float:
    """Compare values, count them, record a finding beyond ``tolerance``; return the relative error.

    Args:
        verdict: receives counts, largest errors and findings.
        actual: what the rank reported.
        expected: the right values, same shape.
        tolerance: bound on max|actual - expected| / scale; 0 asks for equal bits.
        scale: returns the magnitude to divide by; by default max|expected|.
        full: the whole tensor that ``expected`` is rows of, from row ``first`` on: what lies in another place
            of it is recognised.
        first: see ``full``.
        where: fields of the `Finding`: check, rank, step, parameter, judged_by.
    """
    verdict.checks += 1
    verdict.tensors += 1
    verdict.tolerance = max(verdict.tolerance, tolerance)
    if tuple(actual.shape) != tuple(expected.shape):
        what = where.get("parameter") or where["check"]
        verdict.findings.append(
            Finding(
                message=f"{what} has shape {list(actual.shape)} instead of {list(expected.shape)}",
                expected=str(list(expected.shape)),
                actual=str(list(actual.shape)),
                **where,
            )
        )
        return math.inf
    if not expected.size:
        return 0.0
    got = actual.array()
    if got.dtype == expected.dtype and got.tobytes() == expected.tobytes():
        return 0.0
    wide = np.result_type(got.dtype, expected.dtype, np.float64)
    left, right = got.astype(wide), expected.astype(wide)
    error, difference, nonfinite = _largest(left, right)
    size = float(np.nanmax(np.abs(right))) if scale is None else scale()
    relative = error / size if size > 0 else (math.inf if error else 0.0)
    if math.isfinite(relative):
        verdict.max_abs_error = max(verdict.max_abs_error, error)
        verdict.max_rel_error = max(verdict.max_rel_error, relative)
    if relative > tolerance:
        flat = int(np.argmax(np.where(np.isfinite(left - right), difference, np.inf)))
        index = [int(item) for item in np.unravel_index(flat, left.shape)]
        what = where.get("parameter") or where["check"]
        kind = "holds NaN or infinity" if nonfinite > 0 else "differs"
        verdict.findings.append(
            Finding(
                message=f"{what} {kind}: {_ratio_text(left, right)}largest difference at index {index}",
                expected=_number(right.flat[flat]),
                actual=_number(left.flat[flat]),
                max_abs_error=error if math.isfinite(error) else None,
                max_rel_error=relative if math.isfinite(relative) else None,
                tolerance=tolerance,
                detail=signature(got, expected, full=full, first=first),
                **where,
            )
        )
    return relative


def _largest(left: Array, right: Array) -> tuple[float, Array, int]:
    """Return (largest difference, all of them, by how many ``left`` holds more non-finite values)."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(left - right)
        error = float(difference.max())
        if math.isfinite(error):
            return error, difference, 0
        nonfinite = int((~np.isfinite(left)).sum()) - int((~np.isfinite(right)).sum())
        difference = np.where(left == right, 0.0, difference)
    error = float(np.nanmax(difference)) if not np.isnan(difference).all() else math.inf
    return math.inf if nonfinite > 0 else error, difference, nonfinite


def compare_number(verdict: Verdict, actual: float, expected: float, *, tolerance: float, **where: Any) -> None:
    """Compare two scalars relatively."""
    data = TensorData("float64", (), np.float64(actual).tobytes())
    compare(verdict, data, np.asarray(expected, dtype=np.float64), tolerance=tolerance, **where)


def same_bits(left: TensorData, right: TensorData) -> bool:
    """Return whether dtype, shape and every bit agree."""
    return left.dtype == right.dtype and left.shape == right.shape and bytes(left.data) == bytes(right.data)


def assemble(parts: Sequence[Array], dim: int = 0) -> Array:
    """Join the shards of consecutive ranks."""
    return np.concatenate(parts, axis=dim) if len(parts) > 1 else parts[0]


def _ratio_text(left: Array, right: Array) -> str:
    """Say so when the tensor as a whole is a constant multiple of what it should be."""
    if not np.isfinite(left).all():
        return ""
    found = multiple(left, right)
    if found and found["rest"] < CLOSE and abs(found["ratio"] - 1) > 1e-2:
        return f"it is {found['ratio']:.4g} x the expected, "
    return ""


def _number(value: Any) -> str:
    return f"{float(value.real):.9g}" if np.iscomplexobj(value) else f"{float(value):.9g}"
