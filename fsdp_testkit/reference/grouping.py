"""Which modules' parameters form one FSDP unit: ties, modules used in several places, dtypes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.errors import PlanError
from fsdp_testkit.reference.plan import ModuleOptions
from fsdp_testkit.reference.readers import outermost_reader

#: What parameters of one unit have in common: see `Grouping.kind`.
Kind = tuple[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One ``fully_shard`` group: the modules' names (``("",)`` is the root) and their options."""

    modules: tuple[str, ...]
    options: ModuleOptions


class Grouping:
    """Modules that become units, and which of them belong together."""

    def __init__(self, model: nn.Module, wanted: dict[str, ModuleOptions], precision: str | None = None) -> None:
        self.model = model
        self.kept = adapter.fp32_pattern(model, getattr(torch, precision)) if precision else None
        self.options = dict(wanted)
        self.group = {name: name for name in wanted}
        first: dict[int, str] = {}
        #: Every name of a module -> its first one: a module may be used in several places.
        self.first_name = {
            name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)
        }

    def kind(self, name: str, parameter: torch.Tensor) -> Kind:
        """Return what parameters of one unit have in common: dtype, and whether mixed precision leaves them out."""
        return str(parameter.dtype), self.kept is not None and self.kept.search(name) is not None

    def owner(self, module: str) -> str | None:
        """Return the wanted module that manages the parameters directly held by ``module``."""
        while module:
            if self.first_name[module] in self.group:
                return self.first_name[module]
            module = module.rpartition(".")[0]
        return None

    def holder(self, parameter: str) -> str:
        """Return the innermost module around a parameter that has a forward, since that is what gathers a unit."""
        module = parameter.rpartition(".")[0]
        while module and type(self.model.get_submodule(module)).forward is nn.Module.forward:
            module = module.rpartition(".")[0]
        return module

    def reader(self, parameter: str) -> str:
        """Return the outermost module of the same unit that reads a parameter: its `holder`, if no other does."""
        module = self.holder(parameter)
        outer = outermost_reader(self.model, module, anywhere=True) if module else None
        return outer if outer is not None and self.unit_of(outer) == self.unit_of(module) else module

    def add(self, module: str, options: ModuleOptions) -> None:
        """Make ``module`` a unit of its own."""
        self.options[module] = options
        self.group[module] = module

    def join(self, first: str, second: str) -> None:
        """Make the units of two modules one."""
        old, new = self.group[second], self.group[first]
        self.group = {name: new if root == old else root for name, root in self.group.items()}

    def split_shared(self) -> None:
        """Make units of modules that are used inside of several units: each use gathers them on its own."""
        uses: dict[str, list[str]] = defaultdict(list)
        for name, first in self.first_name.items():
            uses[first].append(name)
        for first, names in uses.items():
            owners = {self.owner(name) for name in names}
            if len(owners) > 1 and next(self.model.get_submodule(first).parameters(), None) is not None:
                self.add(first, self.options[next(owner for owner in owners if owner is not None)])

    def merge_tied(self) -> None:
        """Put modules that share a parameter into one unit."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        for tied in names.values():
            owners = [self.owner(self.holder(name)) for name in tied]
            if len(set(owners)) == 1:
                continue
            modules = self.tied_modules(tied)
            first = next(owner for owner in owners if owner is not None)
            for module, owner in zip(modules, owners, strict=True):
                # only the tied modules join: the rest of a block, or of the root, stays where it is
                if module not in self.group:
                    self.add(module, self.options[first if owner is None else owner])
                self.join(modules[0], module)

    def tied_modules(self, names: list[str]) -> list[str]:
        """Return the largest modules around the names of one parameter that have nothing but tied parameters."""
        modules = [self.holder(name) for name in names]
        while all("." in module for module in modules) and not any(module in self.group for module in modules):
            outer = [module.rpartition(".")[0] for module in modules]
            inner = [dict(self.model.get_submodule(module).named_parameters()) for module in outer]
            same = all(part.keys() == inner[0].keys() for part in inner)
            if (
                len(set(outer)) < len(outer)
                or not same
                or any(parameter is not inner[0][name] for part in inner for name, parameter in part.items())
            ):
                break
            modules = outer
        return modules

    def split_dtypes(self, root: ModuleOptions) -> None:
        """Make units of modules whose parameters have another `kind` than the unit they would be part of."""
        # only gradients are reduced as one buffer
        kinds_of = {
            name: self.kind(name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        if len(set(kinds_of.values())) < 2:
            return
        sizes: dict[str | None, Counter[Kind]] = defaultdict(Counter)
        held: dict[str, Counter[Kind]] = defaultdict(Counter)
        for name, kind in kinds_of.items():
            module, count = self.reader(name), self.model.get_parameter(name).numel()
            held[module][kind] += count
            sizes[self.unit_of(module)][kind] += count
        for module, kinds in held.items():
            if len({kept for _, kept in kinds}) > 1:
                raise PlanError(f"module {module!r} holds parameters that mixed precision leaves out, and others")
        # one module with several dtypes cannot be divided: its unit gets a group for each of them
        direct = {module: kinds.most_common(1)[0][0] for module, kinds in held.items()}
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
        """Return the units below the root, children before parents."""
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
            outer = sorted((name for name in names if not inside(name, names)), key=order.__getitem__)
            units.append(Unit(modules=tuple(outer), options=replace(chosen[0], reshard_after_forward=style)))
        return children_first(sorted(units, key=lambda unit: order[unit.modules[0]]))


def children_first(units: list[Unit]) -> list[Unit]:
    """Return the units so that each comes after all that lie inside one of its modules."""
    left, done = list(units), []
    while left:
        free = [
            u for u in left if not any(inside(n, u.modules) for other in left if other is not u for n in other.modules)
        ]
        if not free:
            raise PlanError(f"units {[unit.modules for unit in left]} lie inside each other")
        done += free
        left = [unit for unit in left if unit not in free]
    return done


def inside(name: str, others: Iterable[str]) -> bool:
    """Return whether ``name`` lies below one of ``others``, the root not counted."""
    return any(name.startswith(f"{other}.") for other in others if other)
