"""Plans and subsets that are read from a model's tree as plain data; see `fsdp_testkit.models.tree`.

Imports no torch: the process of pytest reads these without it.
"""

from __future__ import annotations

import math
import re
from typing import Any

#: Part of the names of adapters' parameters, see `fsdp_testkit.models.adapted`.
ADAPTER = ".adapter_"


def manual_plan(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the manual plan that the kit tests with: mixed options, a nested unit, head and norm apart.

    Embedding, blocks and final norm reshard after forward; the largest child of the blocks is a unit of its own
    inside them and keeps its weight, and so does the head. It is written with one rule per pattern (``*`` matches
    one path component), so that implementations which take patterns alone can express it.
    """
    modules: dict[str, dict[str, Any]] = {}
    for embedding in tree["embeddings"]:
        modules[_pattern(embedding)] = {"reshard_after_forward": True}
    for pattern in dict.fromkeys(_pattern(block) for block in tree["blocks"]):
        child = _largest_child(tree, [block for block in tree["blocks"] if _pattern(block) == pattern])
        if child:
            modules[f"{pattern}.{child}"] = {"reshard_after_forward": False}
        modules[pattern] = {"reshard_after_forward": True}
    for norm in tree["norms"]:
        modules[norm] = {"reshard_after_forward": True}
    for head in tree["heads"]:
        modules[_pattern(head)] = {"reshard_after_forward": False}
    return {"mode": "manual", "modules": modules}


def frozen_subset(tree: dict[str, Any]) -> list[str]:
    """Return the parameters that a case with ``freeze`` freezes: the 1-D ones of the first block.

    In a model with adapters these are all but the adapters'.
    """
    if any(ADAPTER in name for name in tree["parameters"]):
        return [name for name in tree["parameters"] if ADAPTER not in name]
    if not tree["blocks"]:
        return []
    prefix = f"{tree['blocks'][0]}."
    return [
        name
        for name, facts in tree["parameters"].items()
        if name.startswith(prefix) and len(facts["shape"]) == 1 and not facts["aliases"]
    ]


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.[^.]+$|$)", ".*", name)


def _largest_child(tree: dict[str, Any], blocks: list[str]) -> str:
    """Return the child name that holds most elements over all blocks and exists in each of them."""
    sizes: dict[str, int] = {}
    seen: dict[str, set[str]] = {}
    for name, facts in tree["parameters"].items():
        block = next((item for item in blocks if name.startswith(f"{item}.")), None)
        rest = name[len(block) + 1 :] if block else ""
        if not block or "." not in rest:
            continue
        child = rest.split(".")[0]
        sizes[child] = sizes.get(child, 0) + math.prod(facts["shape"])
        seen.setdefault(child, set()).add(block)
    common = [child for child in sizes if len(seen[child]) == len(blocks)]
    # mlp-like children are entered through forward in every model; a block's other children may be read directly
    preferred = [child for child in common if any(word in child for word in ("mlp", "ffn", "feed_forward", "moe"))]
    return max(preferred or common, key=lambda child: sizes[child], default="")
