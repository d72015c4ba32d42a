"""How wrong values are wrong: plain facts about an array beside the right one, for the diagnosis.

Computed where a comparison failed, never on the way of a comparison that holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fsdp_testkit.core.evidence import Array

#: Two arrays are multiples of each other where what is left beside the multiple is at most this share.
CLOSE = 1e-3
#: Largest relative step between neighbours in bfloat16: 8 bits of mantissa, one of them implied.
BF16_STEP = 2.0**-8
#: Rows, and places of a row, that are tried at most: a large tensor is not searched through for a diagnosis.
SAMPLE = 64


def signature(actual: Array, expected: Array, *, full: Array | None = None, first: int = 0) -> dict[str, Any]:
    """Return facts about ``actual`` where ``expected`` (same shape, some elements) should be.

    Args:
        actual: what was there.
        expected: what should have been there.
        full: the whole tensor that ``expected`` is rows of; values that lie elsewhere in it are recognised.
        first: the row of ``full`` that ``expected`` starts at.

    Returns:
        ``wrong`` (share of elements that differ); where true, ``nonfinite`` (share), ``fill`` (the one value of
        all wrong elements); for finite values ``ratio`` (least squares) and ``rest`` (what is left beside the
        multiple, relative); ``bf16`` where each element is the right one rounded to bfloat16; ``rows`` ([first,
        last] wrong row of the whole); ``moved`` (share of the wrong rows whose values lie elsewhere in ``full``).
    """
    wide = np.result_type(actual.dtype, expected.dtype, np.float64)
    left, right = np.atleast_1d(actual).astype(wide), np.atleast_1d(expected).astype(wide)
    wrong = ~((left == right) | (np.isnan(left) & np.isnan(right)))
    facts: dict[str, Any] = {"wrong": _round(wrong.mean())}
    if not wrong.any():
        return facts
    strange = left[wrong]
    if lost := float((~np.isfinite(strange)).mean()):
        facts["nonfinite"] = _round(lost)
    finite = strange[np.isfinite(strange)]
    if finite.size > 1 and finite.size == strange.size and (finite == finite[0]).all():
        facts["fill"] = float(finite[0].real)
    if not lost:
        facts |= multiple(left, right)
        if np.iscomplexobj(left) is False and _rounded(left, right):
            facts["bf16"] = True
    rows = np.flatnonzero(wrong.reshape(wrong.shape[0], -1).any(axis=1))
    facts["rows"] = [first + int(rows[0]), first + int(rows[-1])]
    if full is not None:
        facts["of"] = int(np.atleast_1d(full).shape[0])
        facts["moved"] = _round(_moved(left, wrong, np.atleast_1d(full).astype(wide)))
    return facts


def multiple(left: Array, right: Array) -> dict[str, float]:
    """Return ``ratio`` and ``rest``: ``left`` is ratio x ``right`` plus something of relative size rest."""
    size = float(np.linalg.norm(right.reshape(-1)))
    if not size:
        return {}
    ratio = float(np.vdot(right, left).real) / size**2
    return {"ratio": _round(ratio), "rest": _round(float(np.linalg.norm((left - ratio * right).reshape(-1))) / size)}


def _rounded(left: Array, right: Array) -> bool:
    """Whether ``left`` holds nothing but bfloat16 numbers, each one a neighbour of the right value, which do not."""
    near = np.abs(left - right) <= BF16_STEP * np.abs(right)
    return bool(near.all() and _fits_bf16(left) and not _fits_bf16(right))


def _fits_bf16(values: Array) -> bool:
    # a bfloat16 number is a float32 number whose lower half is zero
    narrow = values.astype(np.float32)
    return bool((narrow == values).all() and not (narrow.view(np.uint32) & 0xFFFF).any())


def _moved(left: Array, wrong: Array, full: Array) -> float:
    """Return the share of wrong rows (vectors along the last dim) that occur anywhere in ``full``; `SAMPLE` are tried.

    Rows of zeros are no evidence of a place and are left out; so are one-dimensional tensors, where a row is one
    number, unless the whole part occurs as it is.
    """
    if full.ndim == 1:
        size = left.shape[0]
        if len(np.unique(left[:SAMPLE])) < 2 or size > full.shape[0]:
            return 0.0
        starts = np.flatnonzero(full[: full.shape[0] - size + 1] == left[0])[:SAMPLE]
        return float(any(np.array_equal(left, full[at : at + size]) for at in starts))
    width = left.shape[-1]
    known = full.reshape(-1, width)
    vectors = left.reshape(-1, width)
    picked = vectors[wrong.reshape(-1, width).any(axis=1) & vectors.any(axis=1)]
    if not len(picked):
        return 0.0
    tried = picked[:: -(-len(picked) // SAMPLE)]
    return float(np.mean([_occurs(row, known) for row in tried]))


def _occurs(row: Array, known: Array) -> bool:
    """Whether a vector is one of the rows of ``known``."""
    same = np.flatnonzero(known[:, 0] == row[0])[:SAMPLE]
    return bool((known[same] == row).all(axis=1).any())


def _round(value: Any) -> float:
    return float(f"{float(value):.4g}")
