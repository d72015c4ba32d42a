"""From a plan and a model to FSDP units, and their application."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.errors import PlanError
from fsdp_testkit.reference.grouping import Grouping, Unit, inside
from fsdp_testkit.reference.plan import ModuleOptions, Plan
from fsdp_testkit.reference.readers import outermost_reader


def resolve(plan: Plan, model: nn.Module) -> list[Unit]:
    """Return the units of ``model``, children before parents and the root last.

    Every parameter belongs to exactly one unit. Modules that share a parameter are put in one unit; a module that
    is used inside of several units is a unit of its own, and so is one whose parameters have another dtype than
    the rest of its unit (kept in fp32). What a forward further out reads itself stays in the unit of that forward.

    Args:
        plan: the plan.
        model: the unsharded model; its parameters may be on meta but must have their final dtypes.

    Raises:
        PlanError: a pattern matches nothing, matches a bare container, or options of modules that have to be
            one unit contradict each other; or a module directly holds parameters that mixed precision leaves out
            beside others.
    """
    wanted, together = _auto(model) if plan.mode == "auto" else (_manual(plan, model), [])
    wanted = {name: options.with_defaults(plan.options) for name, options in wanted.items()}
    root = wanted.pop("", plan.options)
    grouping = Grouping(model, wanted, plan.options.mixed_precision)
    grouping.split_shared()
    grouping.merge_tied()
    kinds = {
        grouping.kind(f"{name}.{inner}", parameter)
        for name in together
        for inner, parameter in model.get_submodule(name).named_parameters()
    }
    for name in together if len(kinds) == 1 else ():
        grouping.join(together[0], name)
    grouping.split_dtypes(root)
    units = grouping.units()
    return [*units, Unit(modules=("",), options=root)]


def apply(units: list[Unit], model: nn.Module, mesh: Any) -> None:
    """Call ``fully_shard`` on every unit of ``model`` (on meta) over ``mesh``."""
    mixed_root = units[-1].options.mixed_precision is not None
    twins = adapter.TwinGroups(mesh)
    for unit in units:
        modules = [model.get_submodule(name) for name in unit.modules]
        options = unit.options
        arguments: dict[str, Any] = {}
        if options.mixed_precision is not None:
            dtypes = {p.dtype for module in modules for p in module.parameters()}
            arguments["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=getattr(torch, options.mixed_precision),
                reduce_dtype=torch.float32,
                # modules around a lone mixed unit compute in their own dtype and expect it as input
                output_dtype=None if mixed_root or len(dtypes) != 1 else next(iter(dtypes)),
            )
        if options.cpu_offload:
            # pinning needs an accelerator's runtime
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        else:
            arguments["offload_policy"] = OffloadPolicy()
        if (placements := twins.placements(unit.modules, model)) is not None:
            arguments["shard_placement_fn"] = placements
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            reshard_after_forward=options.reshard_after_forward,
            **arguments,
        )


def _auto(model: nn.Module) -> tuple[dict[str, ModuleOptions], list[str]]:
    """Return (module -> options, modules that are one unit)."""
    names = {module: name for name, module in model.named_modules()}
    free, keep = ModuleOptions(reshard_after_forward=True), ModuleOptions(reshard_after_forward=False)
    wanted: dict[str, ModuleOptions] = {}
    embedding, head = (_gathered(model, names, f"get_{side}_embeddings") for side in ("input", "output"))
    lists = block_lists(model)
    for name in lists:
        for index, block in enumerate(model.get_submodule(name)):
            # a reversible block runs its parts, not itself, once more in backward
            parts = [f".{part}" for part, _ in block.named_children()] if hasattr(block, "backward_pass") else [""]
            for whole in (f"{name}.{index}{part}" for part in parts):
                if any(True for _ in model.get_submodule(whole).parameters()):
                    wanted[whole] = free
    if embedding in names and not inside(names[embedding], wanted):
        wanted |= dict.fromkeys(_wrappable(names[embedding], embedding), free)
    tail: list[str] = []
    if head in names and head is not model:
        norm = _final_norm(model, lists)
        tail = [*([norm] if norm else []), *_wrappable(names[head], head)]
        wanted |= dict.fromkeys(tail, keep)
    return wanted, tail


def _wrappable(name: str, module: nn.Module) -> list[str]:
    """Return the module, or its items if it is a mere container (one embedding or head per codebook)."""
    return [f"{name}.{item}" for item, _ in module.named_children()] if _is_container(module) else [name]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def block_lists(model: nn.Module) -> list[str]:
    """Return the names of the outermost ``ModuleList``s that hold the model's repeated blocks."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or inside(name, found):
            continue
        classes = Counter(type(item) for item in module)
        layers = bool(classes) and all(issubclass(cls, GradientCheckpointingLayer) for cls in classes)
        repeats = any(count > 1 for count in classes.values())
        if (layers or repeats) and any(True for _ in module.parameters()):
            found.append(name)
    return found


def _final_norm(model: nn.Module, lists: list[str]) -> str | None:
    """Return the norm that follows the last list of blocks among its siblings."""
    for name in reversed(lists):
        parent, _, own = name.rpartition(".")
        siblings = list(model.get_submodule(parent).named_children())
        norms = [
            (index, child)
            for index, (child, module) in enumerate(siblings)
            if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters())
        ]
        position = [child for child, _ in siblings].index(own)
        after = [child for index, child in norms if index > position]
        before = [child for index, child in norms if index < position and re.search("final|out|^norm$", child)]
        if chosen := (after or before):
            usual = [child for child in chosen if re.fullmatch(r"(final_)?(layer_?)?norm(_f)?|ln_f", child)]
            best = (usual or chosen)[-1]
            return f"{parent}.{best}" if parent else best
    return None


def _manual(plan: Plan, model: nn.Module) -> dict[str, ModuleOptions]:
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[str, ModuleOptions] = {}
    for pattern, options in plan.modules.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        matches = [name for name in modules if expression.fullmatch(name)]
        if not matches:
            shapes = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in modules if name})
            near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.5)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise PlanError(f"pattern {pattern!r} matches no module of {type(model).__name__}{hint}")
        for name in matches:
            if _is_container(modules[name]):
                raise PlanError(f"pattern {pattern!r} matches the container {name!r}; use '{pattern}.*'")
        matches = [name for name in matches if not name or any(True for _ in modules[name].parameters())]
        if not matches:
            raise PlanError(f"pattern {pattern!r} matches only modules without parameters")
        for name in matches:
            if wanted.setdefault(name, options) != options:
                raise PlanError(f"patterns give module {name!r} different options")
    return wanted


def _gathered(model: nn.Module, names: dict[nn.Module, str], method: str) -> Any:
    """Return an embedding if its own forward, and that of all it is tied to, is what gathers its weight."""
    module = _call(model, method)
    weight = getattr(module, "weight", None)
    places = [other for other in names if module in names and (other is module or _holds(other, weight))]
    if any(outermost_reader(model, names[place], anywhere=False) is not None for place in places if names[place]):
        return None
    return module


def _holds(module: nn.Module, weight: Any) -> bool:
    return weight is not None and any(item is weight for item in module.parameters(recurse=False))


def _call(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
