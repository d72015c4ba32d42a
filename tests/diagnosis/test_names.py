"""Names become patterns, ranks become words."""

from __future__ import annotations

import pytest

from fsdp_testkit.diagnosis.names import patterns, ranks_text, short


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head.weight"], ["lm_head.weight"]),
        (["model.layers.3.mlp.up.weight"], ["model.layers.3.mlp.up.weight"]),
        ([f"model.layers.{i}.q.weight" for i in range(3)], ["model.layers.*.q.weight"]),
        ([f"a.{i}.b.{j}.w" for i in range(2) for j in (4, 4)], ["a.*.b.4.w"]),
        ([f"model.layers.1.{name}.weight" for name in "qkvo"], ["model.layers.1.*"]),
        (
            [f"model.layers.{i}.{n}.weight" for i in range(2) for n in "qkv"] + ["norm.w"],
            ["model.layers.*.*", "norm.w"],
        ),
        (["h.0", "h.1"], ["h.*"]),
        (["", "b", "a", "b"], ["b", "a"]),
    ],
)
def test_patterns(names: list[str], expected: list[str]) -> None:
    assert patterns(names) == expected


def test_only_some_patterns_are_shown() -> None:
    assert short("abcde") == "`a`, `b`, `c` and 2 more"
    assert short([]) == ""


@pytest.mark.parametrize(
    ("ranks", "world", "text"),
    [([1, 0, 1], 2, "every rank"), ([1], 2, "rank 1"), ([0, 2], 4, "ranks 0, 2"), ([0], 1, "rank 0"), ([], 2, "")],
)
def test_ranks(ranks: list[int], world: int, text: str) -> None:
    assert ranks_text(ranks, world) == text
