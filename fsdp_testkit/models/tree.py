"""The module tree of a plain (unsharded) model as plain data: what structural rules are read from.

Nothing here looks at an implementation under test: the tree is taken from a model that the kit built
itself, on the meta device or in memory.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

#: Modules of this base are repeated blocks (transformers.modeling_layers, public since 4.53).
_BLOCK_BASE = "GradientCheckpointingLayer"
#: Names that final norms usually have; where a model has further norms beside its blocks, these decide.
FINAL_NORMS = frozenset(
    {"norm", "final_norm", "ln_f", "norm_f", "layernorm", "layer_norm", "final_layernorm", "final_layer_norm"}
)


def module_tree(model: nn.Module) -> dict[str, Any]:
    """Describe ``model`` as JSON data.

    Returns:
        ``parameters``: FQN -> ``shape``, ``dtype``, ``requires_grad``, ``aliases`` (further FQNs of the same
        object); ``modules``: FQN -> class name, in registration order; ``blocks``: FQNs of the outermost
        repeated blocks; ``embeddings``, ``heads``: FQNs of the input embedding and the head, one for each codebook
        where the model has several; ``norms``: FQNs of the final norm modules. An embedding or head whose weight is
        read by the forward of a module around it is left out: it cannot be an FSDP unit, since only its own forward
        would gather it.
    """
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = find_blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    parameters = describe_parameters(model)
    embeddings, heads = (
        [
            name
            for name in _tables(model, _embedding(model, f"get_{side}_embeddings", names))
            if not read_from_outside(model, parameters, name)
        ]
        for side in ("input", "output")
    )
    return {
        "parameters": parameters,
        "modules": modules,
        "blocks": blocks,
        "embeddings": embeddings,
        "heads": heads,
        "norms": _final_norms(model, blocks, {*embeddings, *heads}),
    }


def describe_parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return every parameter under its first FQN, with the other FQNs of the same object as aliases."""
    first: dict[int, str] = {}
    result: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            result[first[id(parameter)]]["aliases"].append(name)
            continue
        first[id(parameter)] = name
        result[name] = {
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "requires_grad": parameter.requires_grad,
            "aliases": [],
        }
    return result


def read_from_outside(model: nn.Module, parameters: dict[str, dict[str, Any]], module: str) -> bool:
    """Return whether a forward further out reads what ``module`` directly holds, or what that is tied to.

    Told from the source of the forwards: ``self.embed_tokens.weight[pad]``. Facts such as ``.dtype`` do not count.
    """
    groups = [[name, *facts["aliases"]] for name, facts in parameters.items()]
    tied = [group for group in groups if module and any(name.rpartition(".")[0] == module for name in group)]
    for parts in (name.split(".") for group in tied for name in group):
        for depth in range(len(parts) - 1):  # the last part is read by the holder's own forward: "self.weight"
            read = f"self.{'.'.join(parts[depth:])}"
            around: Any = type(model.get_submodule(".".join(parts[:depth])))
            source = _forward_source(around)
            if read in source and re.search(rf"{re.escape(read)}\b(?!\.(dtype|device|shape)\b)", source):
                return True
    return False


@cache
def _forward_source(cls: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):  # made at run time
        return ""


def find_blocks(model: nn.Module) -> list[str]:
    """Return the FQNs of the outermost repeated blocks.

    A block is an item of a ``ModuleList`` that is a gradient-checkpointing layer or, where the list has
    none, a composite module (two or more children with parameters, or a child with children) of which the
    list holds at least two. Blocks inside blocks (experts, sub-layers) are not counted.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{block}.") for block in blocks):
            continue
        items = [item for item in module if next(item.parameters(), None) is not None]
        layers = [item for item in items if any(base.__name__ == _BLOCK_BASE for base in type(item).__mro__)]
        if not layers and len(items) >= 2 and all(_is_composite(item) for item in items):
            layers = items
        chosen = {id(layer) for layer in layers}
        for index, item in enumerate(module):
            if id(item) in chosen:
                blocks.extend(f"{name}.{index}{part}" for part in _gathered_parts(item))
    return blocks


def _gathered_parts(block: nn.Module) -> list[str]:
    """Return ``[""]``, or the parts of a reversible block: backward runs them again, without the block's forward."""
    if not hasattr(block, "backward_pass"):
        return [""]
    return [f".{name}" for name, part in block.named_children() if next(part.parameters(), None) is not None]


def _is_composite(module: nn.Module) -> bool:
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    return len(children) >= 2 or any(next(child.children(), None) is not None for child in children)


def _embedding(model: nn.Module, getter: str, names: dict[int, str]) -> str:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return ""
    return names.get(id(module), "") if module is not None else ""


def _tables(model: nn.Module, name: str) -> list[str]:
    """Return the embedding, or the items of the list that it is."""
    if not name or not isinstance(model.get_submodule(name), nn.ModuleList):
        return [name] if name else []
    return [f"{name}.{item}" for item, _ in model.get_submodule(name).named_children()]


def _final_norms(model: nn.Module, blocks: list[str], taken: set[str]) -> list[str]:
    """Return norm modules that are siblings of the last block list and registered after it."""
    if not blocks:
        return []
    list_name = re.sub(r"\.\d+(\.[^.]+)?$", "", blocks[-1])
    parent_name, _, own = list_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    names = [name for name, _ in parent.named_children()]
    norms = []
    for child in names[names.index(own) + 1 :] if own in names else []:
        module = parent.get_submodule(child)
        name = f"{parent_name}.{child}" if parent_name else child
        looks = "norm" in child.lower() or "norm" in type(module).__name__.lower() or child == "ln_f"
        one = not isinstance(module, (nn.ModuleList, nn.ModuleDict))  # a list holds the norms of the blocks
        if looks and one and name not in taken and next(module.parameters(), None) is not None:
            norms.append(name)
    named = [name for name in norms if name.rpartition(".")[2] in FINAL_NORMS]
    return named or norms
