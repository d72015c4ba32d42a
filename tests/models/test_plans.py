"""Plans that are read from a tree."""

from __future__ import annotations

from typing import Any

from fsdp_testkit.models.plans import manual_plan


def tree(embeddings: list[str], heads: list[str]) -> dict[str, Any]:
    shapes = {"layers.0.mlp.weight": [8, 4], "layers.0.norm.weight": [4], "layers.1.mlp.weight": [8, 4]}
    shapes |= {"layers.1.norm.weight": [4]}
    return {
        "embeddings": embeddings,
        "heads": heads,
        "norms": ["norm"],
        "blocks": ["layers.0", "layers.1"],
        "parameters": {name: {"shape": shape, "aliases": []} for name, shape in shapes.items()},
    }


def test_one_rule_for_each_pattern() -> None:
    keep, free = {"reshard_after_forward": False}, {"reshard_after_forward": True}
    assert manual_plan(tree(["embed"], ["head"]))["modules"] == {
        "embed": free,
        "layers.*.mlp": keep,
        "layers.*": free,
        "norm": free,
        "head": keep,
    }


def test_tables_of_codebooks_are_a_pattern() -> None:
    modules = manual_plan(tree(["embed.0", "embed.1"], ["heads.0", "heads.1"]))["modules"]
    assert [name for name in modules if "layers" not in name] == ["embed.*", "norm", "heads.*"]
