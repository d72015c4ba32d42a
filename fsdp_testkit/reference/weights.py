"""Which keys of a checkpoint make which parameters, and how to make only some rows of one.

transformers renames and converts weights between files and models (experts fused into one tensor, projections
split). Each conversion is first run on meta tensors, which gives its targets with their shapes at no cost; so
everything that does not fit is known before memory is spent.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.errors import LoadError
from fsdp_testkit.reference.files import Checkpoint

#: bytes of a conversion's result at a time, where it can be made in parts
CHUNK = 4 * 2**20


@dataclass(slots=True)
class Group:
    """Keys of a file that together make one or several tensors of the model.

    Attributes:
        name: the first target, which also names the group.
        sources: (source pattern, key) in the order in which the conversion takes them.
        transform: transformers' converter, or ``None`` when the one key only has another name.
        targets: target name -> shape.
        dtypes: target name -> dtype in which it comes out of the file.
        strategy: how rows of a target are found: ``plain`` (same rows of the one key), ``aligned`` (same rows
            of every key), ``stacked`` (row i is made of the i-th keys), ``piled`` (the same, and it consists of the
            rows of these keys, moved about), ``permuted`` (whole rows moved about), or ``full`` (convert
            everything, then slice).
    """

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    transform: Any = None
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    strategy: str = "plain"

    def convert(self, tensors: list[tuple[str, torch.Tensor]], model: Any) -> dict[str, torch.Tensor]:
        """Run the conversion on (source pattern, tensor) pairs; return target name -> tensor."""
        transform = copy.deepcopy(self.transform)
        for pattern, tensor in tensors:
            transform.add_tensor(self.name, self.name, pattern, tensor)
        with torch.no_grad():
            made = transform.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(slots=True)
class WeightMap:
    """All groups of a load, the transforms that matched anything, and the problems that were found."""

    groups: list[Group]
    used: list[Any]
    problems: list[str]


def match(checkpoint: Checkpoint, model: Any) -> WeightMap:
    """Pair the checkpoint's keys with the tensors of the unsharded meta ``model``."""
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    transforms = adapter.conversions(model)
    renamings, converters = adapter.split_transforms(transforms)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, Group] = {}
    unexpected: dict[str, str] = {}
    problems = list(checkpoint.problems)
    for key in sorted(checkpoint.entries, key=adapter.natural_order):
        name, pattern = adapter.renamed(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected:
            unexpected[name] = key
            continue
        group = groups.setdefault(name, Group(name=name))
        converter = None if pattern is None else by_pattern[pattern]
        if group.sources and (converter is None or group.transform is None):
            problems.append(f"doubled key {name!r}: made by {group.sources[0][1]!r} and by {key!r}")
            continue
        group.transform = converter
        group.sources.append((pattern or key, key))
    found: dict[str, str] = {}
    for group in groups.values():
        problems += _shape(group, checkpoint, model, expected)
        for target in group.targets:
            if target in found:
                problems.append(f"doubled key {target!r}: made by groups {found[target]!r} and {group.name!r}")
            found[target] = group.name
    missing = _untied(model, set(expected) - set(found), set(found))
    missing, ignored = adapter.filter_keys(model, missing, set(unexpected))
    problems += [f"missing key {name!r} {tuple(expected[name].shape)}" for name in sorted(missing)]
    problems += [f"unexpected key {unexpected[name]!r}" for name in sorted(ignored)]
    return WeightMap(list(groups.values()), [t for t in transforms if t.was_used()], problems)


def _untied(model: Any, missing: set[str], found: set[str]) -> set[str]:
    """Return ``missing`` without the names of parameters that are found under another name."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    covered = {name for group in names.values() if not found.isdisjoint(group) for name in group}
    return missing - covered


def _shape(group: Group, checkpoint: Checkpoint, model: Any, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    """Fill in the group's targets and strategy, and yield what does not fit."""
    if group.transform is None:
        entry = checkpoint.entries[group.sources[0][1]]
        group.targets, group.dtypes = {group.name: entry.shape}, {group.name: entry.dtype}
    else:
        tensors = [(pattern, checkpoint.meta(key)) for pattern, key in group.sources]
        try:
            made = group.convert(tensors, model)
        except Exception as error:
            keys = ", ".join(key for _, key in group.sources[:3])
            yield f"keys {keys}, ... cannot be converted to {group.name!r}: {type(error).__name__}: {error}"
            return
        group.targets = {name: tuple(tensor.shape) for name, tensor in made.items()}
        group.dtypes = {name: tensor.dtype for name, tensor in made.items()}
        group.strategy = _strategy(group, checkpoint, model)
    for name, shape in group.targets.items():
        if name not in expected:
            yield f"unexpected key {name!r}, made of {group.sources[0][1]!r}"
        elif shape != tuple(expected[name].shape):
            yield f"mismatched shape of {name!r}: {shape} in the file, {tuple(expected[name].shape)} in the model"


def _strategy(group: Group, checkpoint: Checkpoint, model: Any) -> str:
    """Return the leanest way to make some rows of the group's targets."""
    first, *rest = operations = list(group.transform.operations)
    if not all(shape and shape[0] for shape in group.targets.values()):
        return "full"
    if all(adapter.permutes_rows(op) for op in operations):
        return "permuted"
    inner = rest if adapter.stacks_rows(first) else operations
    if not all(dims is not None and min(dims) >= 1 for dims in map(adapter.changed_dims, inner)):
        return "full"
    strategy = "stacked" if adapter.stacks_rows(first) else "aligned"
    rows = {shape[0] for shape in group.targets.values()}
    try:  # the first row alone has to convert to one row of each target
        one = group.convert(list(_pick(group, checkpoint, strategy, 0, 1, meta=True)), model)
    except Exception:  # any failure means only that the lean way is not open
        return "full"
    fits = {name: tuple(t.shape) for name, t in one.items()} == {n: (1, *s[1:]) for n, s in group.targets.items()}
    if not fits or len(rows) != 1:
        return "full"
    deep = all(len(checkpoint.entries[key].shape) > 1 for _, key in group.sources)
    return "piled" if strategy == "stacked" and deep and all(map(adapter.moves_second_dim, inner)) else strategy


def _pick(
    group: Group, checkpoint: Checkpoint, strategy: str, start: int, stop: int, *, meta: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (parts of) sources that rows ``[start, stop)`` of the targets are made of."""
    counts: dict[str, int] = defaultdict(int)
    for pattern, key in group.sources:
        position = counts[pattern]
        counts[pattern] += 1
        if strategy == "aligned":
            yield pattern, checkpoint.meta(key)[start:stop] if meta else checkpoint.rows(key, start, stop)
        elif start <= position < stop:
            yield pattern, checkpoint.meta(key) if meta else checkpoint.full(key)


class GroupReader:
    """Makes rows of one group's targets, reading no more of the file than its strategy needs."""

    def __init__(self, group: Group, checkpoint: Checkpoint, model: Any) -> None:
        self.group = group
        self.checkpoint = checkpoint
        self.model = model
        self._converted: dict[str, torch.Tensor] | None = None
        self._origins: dict[str, list[int]] | None = None

    def read_into(self, out: torch.Tensor, target: str, start: int) -> None:
        """Fill ``out`` (any dtype and device) with rows of ``target`` from ``start`` on.

        Args:
            out: shape ``(rows, *rest)``, or the shape of the whole target when that has no dims.
            target: a name of the group's targets.
            start: first row.

        Raises:
            LoadError: the conversion made another shape than on meta.
        """
        if out.numel() == 0:
            return
        if self.group.strategy == "permuted":
            self._permuted(out, target, start, self.group.sources)
        elif self.group.strategy == "piled":
            self._piled(out, target, start)
        elif self.group.strategy in ("aligned", "stacked"):
            # a few rows at a time: a conversion holds them more than once
            step = max(1, CHUNK * out.shape[0] // out.nbytes)
            for row in range(0, out.shape[0], step):
                rows = out[row : row + step]
                rows.copy_(self.part(target, start + row, rows.shape))
        else:
            out.copy_(self.part(target, start, out.shape))

    def part(self, target: str, start: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Return rows of ``target`` from ``start`` on in the file's dtype, as a view of the file's map if they lie so.

        Args:
            target: a name of the group's targets.
            start: first row.
            shape: ``(rows, *rest)``, or ``()``.

        Raises:
            LoadError: the conversion made another shape than on meta.
        """
        group = self.group
        stop = start + shape[0] if shape else 0
        if group.strategy == "plain":
            key = group.sources[0][1]
            return self.checkpoint.rows(key, start, stop) if shape else self.checkpoint.full(key)
        if 0 in shape:
            return torch.empty(shape, dtype=group.dtypes[target])
        if group.strategy in ("permuted", "piled"):
            made = torch.empty(shape, dtype=group.dtypes[target])
            self.read_into(made, target, start)
            return made
        if group.strategy == "full":
            if self._converted is None:
                sources = [(pattern, self.checkpoint.full(key)) for pattern, key in group.sources]
                self._converted = group.convert(sources, self.model)
            made = self._converted[target]
            made = made[start:stop] if shape else made
        else:
            picked = list(_pick(group, self.checkpoint, group.strategy, start, stop))
            made = group.convert(picked, self.model)[target]
        if made.shape != tuple(shape):
            raise LoadError(f"{target!r}: converted to {tuple(made.shape)}, expected {tuple(shape)}")
        return made

    def _piled(self, out: torch.Tensor, target: str, start: int) -> None:
        """Copy the rows that each row of ``out`` consists of."""
        piles: dict[str, list[str]] = defaultdict(list)
        for pattern, key in self.group.sources:
            piles[pattern].append(key)
        for index, rows in enumerate(out):
            sources = [(pattern, keys[start + index]) for pattern, keys in piles.items()]
            self._permuted(rows, target, 0, sources)

    def _permuted(self, out: torch.Tensor, target: str, start: int, sources: list[tuple[str, str]]) -> None:
        """Copy runs of rows of ``sources``, found by converting row numbers in place of rows."""
        bounds, numbers, base = [], [], 0
        for pattern, key in sources:
            shape = self.checkpoint.entries[key].shape
            bounds.append((base, base + shape[0], key))
            if self._origins is None:
                rows = torch.arange(base, base + shape[0]).reshape(-1, *[1] * (len(shape) - 1))
                numbers.append((pattern, rows))
            base += shape[0]
        if self._origins is None:
            self._origins = {n: t.flatten().tolist() for n, t in self.group.convert(numbers, self.model).items()}
        wanted = self._origins[target][start : start + out.shape[0]]
        position = 0
        while position < len(wanted):
            low = wanted[position]
            first, last, key = next(bound for bound in bounds if bound[0] <= low < bound[1])
            length = 1
            while position + length < len(wanted) and wanted[position + length] == low + length < last:
                length += 1
            rows = self.checkpoint.rows(key, low - first, low - first + length)
            out[position : position + length].copy_(rows)
            position += length
