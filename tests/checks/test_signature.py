"""How wrong values are wrong: each fact on arrays made for it, and what must not show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fsdp_testkit.checks.signature import multiple, signature

FULL = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
Array = npt.NDArray[Any]


def rounded(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32)


def test_equal_values_have_no_signature() -> None:
    holed = np.array([1.0, np.nan], dtype=np.float32)
    assert signature(FULL, FULL) == {"wrong": 0.0}
    assert signature(holed, holed.copy()) == {"wrong": 0.0}


def test_multiples_and_what_is_left_beside() -> None:
    facts = signature(FULL * 2, FULL)
    assert facts["ratio"] == 2.0
    assert facts["rest"] < 1e-6
    noise = np.zeros_like(FULL)
    noise[0, 0] = np.linalg.norm(FULL)
    assert multiple(FULL + noise, FULL)["rest"] > 0.5
    assert multiple(FULL, np.zeros_like(FULL)) == {}


@pytest.mark.parametrize(("fill", "key"), [(0.0, "fill"), (1e30, "fill"), (np.nan, "nonfinite")])
def test_memory_that_nothing_filled(fill: float, key: str) -> None:
    facts = signature(np.full_like(FULL, fill), FULL)
    assert key in facts
    assert ("nonfinite" in facts) == bool(np.isnan(fill))
    assert "moved" not in facts
    assert "fill" not in signature(FULL[::-1], FULL)


def test_rows_are_those_of_the_whole() -> None:
    actual = FULL[3:].copy()
    actual[1] = 0
    facts = signature(actual, FULL[3:], full=FULL, first=3)
    assert facts["rows"] == [4, 4]
    assert facts["of"] == 5
    assert facts["wrong"] == 0.5
    # zeros lie nowhere
    assert facts["moved"] == 0.0


def test_rows_of_another_place_are_recognised() -> None:
    assert signature(FULL[:2], FULL[3:], full=FULL, first=3)["moved"] == 1.0
    assert signature(FULL[:2] * 3, FULL[3:], full=FULL, first=3)["moved"] == 0.0
    halves = np.stack([FULL[:2], FULL[2:4]])
    assert signature(halves[::-1], halves, full=halves)["moved"] == 1.0
    flat = np.arange(6.0)
    assert signature(flat[:3], flat[3:], full=flat, first=3)["moved"] == 1.0
    # one number may be anywhere
    assert signature(flat[:1], flat[5:], full=flat, first=5)["moved"] == 0.0


def test_rounding_to_bf16_is_told_from_other_small_errors() -> None:
    assert signature(rounded(FULL), FULL)["bf16"]
    assert "bf16" not in signature(FULL * np.float32(1.001), FULL)
    assert "bf16" not in signature(rounded(FULL) * 2, FULL)
    # what was bf16 already cannot have been rounded
    assert "bf16" not in signature(rounded(FULL) + rounded(FULL), rounded(FULL))


def test_numbers_and_complex_values() -> None:
    assert signature(np.asarray(3.0), np.asarray(1.5))["ratio"] == 2.0
    turned = FULL.astype(np.complex64) * 1j
    assert signature(turned, FULL.astype(np.complex64))["rest"] == pytest.approx(1.0)
