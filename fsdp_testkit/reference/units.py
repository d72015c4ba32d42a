"""From a plan and a model to FSDP units, and their application."""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from fsdp_testkit.reference.errors import PlanError
from fsdp_testkit.reference.plan import ModuleOptions, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One ``fully_shard`` group: the modules' names (``("",)`` is the root) and their options."""

    modules: tuple[str, ...]
    options: ModuleOptions


def resolve(plan: Plan, model: nn.Module) -> list[Unit]:
    """Return the units of ``model``, children before parents and the root last.

    Every parameter belongs to exactly one unit and every unit has one parameter dtype: modules that share a
    parameter are put in one unit, and modules whose parameters have another dtype than the rest of their unit
    (kept in fp32) become units of their own.

    Args:
        plan: the plan.
        model: the unsharded model; its parameters may be on meta but must have their final dtypes.

    Raises:
        PlanError: a pattern matches nothing, matches a bare container, or options of modules that have to be
            one unit contradict each other; or a module directly holds parameters of several dtypes.
    """
    wanted, together = _auto(model) if plan.mode == "auto" else (_manual(plan, model), [])
    root = wanted.pop("", ModuleOptions())
    grouping = _Grouping(model, wanted)
    grouping.merge_tied()
    dtypes = {p.dtype for name in together for p in model.get_submodule(name).parameters()}
    for name in together if len(dtypes) == 1 else ():
        grouping.join(together[0], name)
    grouping.split_dtypes(root)
    units = grouping.units()
    return [*units, Unit(modules=("",), options=root)]


def apply(units: list[Unit], model: nn.Module, mesh: Any) -> None:
    """Call ``fully_shard`` on every unit of ``model`` (on meta) over ``mesh``."""
    mixed_root = units[-1].options.mixed_precision is not None
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
    embedding = _call(model, "get_input_embeddings")
    head = _call(model, "get_output_embeddings")
    lists = block_lists(model)
    for name in lists:
        for index, block in enumerate(model.get_submodule(name)):
            if any(True for _ in block.parameters()):
                wanted[f"{name}.{index}"] = free
    if embedding in names and not _inside(names[embedding], wanted):
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
        if not isinstance(module, nn.ModuleList) or _inside(name, found):
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


class _Grouping:
    """Modules that become units, and which of them belong together."""

    def __init__(self, model: nn.Module, wanted: dict[str, ModuleOptions]) -> None:
        self.model = model
        self.options = dict(wanted)
        self.group = {name: name for name in wanted}

    def owner(self, module: str) -> str | None:
        """Return the wanted module that manages the parameters directly held by ``module``."""
        while module:
            if module in self.group:
                return module
            module = module.rpartition(".")[0]
        return None

    def holder(self, parameter: str) -> str:
        """Return the innermost module around a parameter that has a forward, since that is what gathers a unit."""
        module = parameter.rpartition(".")[0]
        while module and type(self.model.get_submodule(module)).forward is nn.Module.forward:
            module = module.rpartition(".")[0]
        return module

    def add(self, module: str, options: ModuleOptions) -> None:
        self.options[module] = options
        self.group[module] = module

    def join(self, first: str, second: str) -> None:
        old, new = self.group[second], self.group[first]
        self.group = {name: new if root == old else root for name, root in self.group.items()}

    def merge_tied(self) -> None:
        holders: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            holders[id(parameter)].append(self.holder(name))
        for modules in holders.values():
            owners = [self.owner(module) for module in modules]
            if len(set(owners)) == 1:
                continue
            first = next(owner for owner in owners if owner is not None)
            for module, owner in zip(modules, owners, strict=True):
                if owner is None:
                    # only the holder itself joins, the rest of the root stays where it is
                    self.add(module, self.options[first])
                self.join(first, module if owner is None else owner)

    def split_dtypes(self, root: ModuleOptions) -> None:
        """Make units of modules whose parameters have another dtype than the unit they would be part of."""
        sizes: dict[str | None, Counter[torch.dtype]] = defaultdict(Counter)
        direct: dict[str, torch.dtype] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue  # only gradients are reduced as one buffer
            module = self.holder(name)
            if direct.setdefault(module, parameter.dtype) != parameter.dtype:
                dtypes = sorted(map(str, {direct[module], parameter.dtype}))
                raise PlanError(f"module {module!r} holds parameters of several dtypes: {dtypes}")
            sizes[self.unit_of(module)][parameter.dtype] += parameter.numel()
        dtype = {unit: counter.most_common()[0][0] for unit, counter in sizes.items()}
        for module in (name for name, _ in self.model.named_modules() if name in direct):  # parents first
            unit = self.unit_of(module)
            if dtype.get(unit) == direct[module]:
                continue
            if module and module not in self.group:
                options = root if unit is None else self.options[unit]
                # gathered by a forward of its own; a cast is not what keeping a dtype asks for
                self.add(module, replace(options, reshard_after_forward=None, mixed_precision=None))
            elif sum(other == unit for other in self.group.values()) > 1:
                raise PlanError(f"module {module!r} has another dtype than the modules that share its parameters")
            # the unit's own module decides: what lies inside with another dtype leaves it
            dtype[self.unit_of(module)] = direct[module]

    def unit_of(self, module: str) -> str | None:
        """Return the name of the group that manages what ``module`` directly holds; ``None`` is the root."""
        owner = self.owner(module)
        return None if owner is None else self.group[owner]

    def units(self) -> list[Unit]:
        members: dict[str, list[str]] = defaultdict(list)
        for name, root in self.group.items():
            members[root].append(name)
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules(remove_duplicate=False))}
        units = []
        for names in members.values():
            chosen = [self.options[name] for name in names]
            if len({replace(options, reshard_after_forward=None) for options in chosen}) > 1:
                raise PlanError(f"modules {sorted(names)} share parameters and need the same options")
            styles = {options.reshard_after_forward for options in chosen}
            # what is kept for one of them is kept for all
            style = False if False in styles else True if True in styles else None
            outer = sorted((name for name in names if not _inside(name, names)), key=order.__getitem__)
            units.append(Unit(modules=tuple(outer), options=replace(chosen[0], reshard_after_forward=style)))
        return _children_first(sorted(units, key=lambda unit: order[unit.modules[0]]))


def _children_first(units: list[Unit]) -> list[Unit]:
    """Return the units so that each comes after all that lie inside one of its modules."""
    left, done = list(units), []
    while left:
        free = [
            u for u in left if not any(_inside(n, u.modules) for other in left if other is not u for n in other.modules)
        ]
        if not free:
            raise PlanError(f"units {[unit.modules for unit in left]} lie inside each other")
        done += free
        left = [unit for unit in left if unit not in free]
    return done


def _inside(name: str, others: Any) -> bool:
    return any(name.startswith(f"{other}.") for other in others if other)


def _call(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
