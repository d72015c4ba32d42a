"""Which tensors of a model make which tensors of the files, and how rows of the ones become rows of the others.

Saving reverts transformers' conversions of weights (a tensor of experts is split into one per expert,
projections are put together). Each conversion is first run on meta tensors, which tells its results at no
cost; a group of tensors that one conversion joins is never split over files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fsdp_testkit.reference import adapter
from fsdp_testkit.reference.files import SINGLE
from fsdp_testkit.reference.outfile import Frame, Spec, frame

#: the number of the first row, and rows
Held = tuple[int, torch.Tensor]


class Piece(NamedTuple):
    """Consecutive rows of one tensor of a file: its key, bytes from the tensor's start, and the rows."""

    key: str
    offset: int
    data: torch.Tensor


@dataclass(slots=True)
class SaveGroup:
    """Tensors of the model that together make one or several tensors of the files.

    Attributes:
        name: the conversion's first target, or the one key of the file.
        sources: (source pattern, name in the model).
        transform: transformers' reverse converter, or ``None`` for a plain copy.
        inputs: name in the model -> what it is, in the order of ``sources``.
        outputs: key in the file -> what it is, in the order in which the conversion makes them.
        strategy: what a process makes of its own rows ``[start, stop)`` of every source: ``rows`` (the same rows
            of every output), ``unstacked`` (each row is an output), ``moved`` (rows at other places), or
            ``full`` (nothing without all rows).
    """

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    transform: Any = None
    inputs: dict[str, Spec] = field(default_factory=dict)
    outputs: dict[str, Spec] = field(default_factory=dict)
    strategy: str = "rows"

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(spec.nbytes for spec in self.outputs.values())

    def convert(self, tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Return target -> tensor in the order of ``outputs``, from model name -> tensor; names lack renamings."""
        if self.transform is None:
            return {self.name: tensors[self.sources[0][1]]}
        transform = copy.deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.name, name, pattern, tensors[name])
        with torch.no_grad():
            made = transform.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def whole(self, tensors: Mapping[str, torch.Tensor], model: Any) -> Iterator[Piece]:
        """Yield all outputs from whole sources."""
        made = self.convert(tensors, model)
        for key, data in zip(self.outputs, made.values(), strict=True):
            yield Piece(key, 0, data)

    def part(self, held: Mapping[str, Held], block: int, model: Any) -> Iterator[Piece]:
        """Yield what some rows of the sources make, in blocks of about ``block`` bytes of the sources.

        Args:
            held: model name -> (number of the first row, rows); the same rows of each unless ``moved``.
            block: bytes that are converted at a time; at least one row is.
            model: the model, for its config.
        """
        if self.strategy == "moved":
            yield from self._moved(held, block, model)
            return
        start, first = next(iter(held.values()))
        count = first.shape[0]
        width = sum(tensor.nbytes for _, tensor in held.values()) // max(1, count)
        step = max(1, block // max(1, width))
        if self.transform is None and first.is_cpu:
            step = max(1, count)  # nothing is copied, whatever the size
        for low in range(0, count, step):
            cut = {name: tensor[low : low + step] for name, (_, tensor) in held.items()}
            made = list(self.convert(cut, model).values())
            yield from self._placed(made, start + low, min(step, count - low))

    def _placed(self, made: list[torch.Tensor], start: int, count: int) -> Iterator[Piece]:
        """Yield what rows ``[start, start + count)`` were converted to, with their places."""
        keys = list(self.outputs)
        if self.strategy == "rows":
            for key, data in zip(keys, made, strict=True):
                yield Piece(key, start * self.outputs[key].row_bytes, data)
            return
        # the first `count` results are made by the first pattern, and so on
        height = len(keys) * count // len(made)
        for index, data in enumerate(made):
            yield Piece(keys[index // count * height + start + index % count], 0, data)

    def _moved(self, held: Mapping[str, Held], block: int, model: Any) -> Iterator[Piece]:
        heights = {name: spec.shape[0] for name, spec in self.inputs.items()}
        origins = self._origins(model)
        base = 0
        for _, name in self.sources:
            start, tensor = held[name]
            first = base + start
            base += heights[name]
            for (key, spec), origin in zip(self.outputs.items(), origins, strict=True):
                places = ((origin >= first) & (origin < first + tensor.shape[0])).nonzero().flatten()
                cuts = (places.diff() != 1).nonzero().flatten() + 1
                for run in places.tensor_split(cuts) if len(places) else ():
                    for some in run.split(max(1, block // max(1, spec.row_bytes))):
                        picked = tensor.index_select(0, (origin[some] - first).to(tensor.device))
                        yield Piece(key, int(some[0]) * spec.row_bytes, picked)

    def _origins(self, model: Any) -> list[torch.Tensor]:
        """Return, for each output, the numbers of the rows it is made of; sources are numbered one after the other."""
        numbers, base = {}, 0
        for name, spec in self.inputs.items():
            rows = torch.arange(base, base + spec.shape[0])
            numbers[name] = rows.reshape(-1, *[1] * (len(spec.shape) - 1))
            base += spec.shape[0]
        return [tensor.flatten() for tensor in self.convert(numbers, model).values()]

    def choose(self, model: Any) -> str:
        """Return the strategy, found by converting one row on meta, or row numbers."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        operations = list(self.transform.operations)
        try:  # any failure means only that the lean way is not open
            if all(adapter.permutes_rows(op) for op in operations):
                widths = {math.prod(spec.shape[1:]) for spec in specs}
                origins = self._origins(model)
                total = sum(spec.shape[0] for spec in self.inputs.values())
                fits = [len(o) for o in origins] == [spec.shape[0] for spec in self.outputs.values()]
                all_there = torch.equal(torch.cat(origins).sort().values, torch.arange(total))
                return "moved" if fits and all_there and len(widths) == 1 else "full"
            unstacks = adapter.unstacks_rows(operations[-1])
            inner = operations[:-1] if unstacks else operations
            if not all(dims is not None and min(dims) >= 1 for dims in map(adapter.changed_dims, inner)):
                return "full"
            (height,) = {spec.shape[0] for spec in self.inputs.values()}
            one = {name: _meta(Spec(spec.dtype, (1, *spec.shape[1:]))) for name, spec in self.inputs.items()}
            made = [tuple(tensor.shape) for tensor in self.convert(one, model).values()]
        except Exception:
            return "full"
        shapes = [spec.shape for spec in self.outputs.values()]
        if unstacks and [shape for shape in made for _ in range(height)] == shapes:
            return "unstacked"
        if not unstacks and [(height, *shape[1:]) for shape in made] == shapes:
            return "rows"
        return "full"


def groups_of(model: Any, state: Mapping[str, torch.Tensor]) -> list[SaveGroup]:
    """Return the conversion groups of all that is saved, in the order of the files."""
    renamings, converters = adapter.split_transforms(adapter.reversed_conversions(model))
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, SaveGroup] = {}
    for name in sorted(state, key=adapter.natural_order):
        key, pattern = adapter.reverse_renamed(name, renamings, converters)
        group = groups.setdefault(key, SaveGroup(name=key))
        if pattern is not None:
            group.transform = by_pattern[pattern]
        group.sources.append((pattern or name, name))
        group.inputs[name] = Spec(state[name].dtype, tuple(state[name].shape))
    strategies: dict[Any, str] = {}
    for group in groups.values():
        if group.transform is None:
            group.outputs = {group.name: group.inputs[group.sources[0][1]]}
            continue
        made = group.convert({name: _meta(spec) for name, spec in group.inputs.items()}, model)
        group.outputs = {
            adapter.apply_renamings(key, renamings): Spec(tensor.dtype, tuple(tensor.shape))
            for key, tensor in made.items()
        }
        # the same in every layer
        alike = id(group.transform), tuple(group.inputs.values()), tuple(group.outputs.values())
        if alike not in strategies:
            strategies[alike] = group.choose(model)
        group.strategy = strategies[alike]
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file: its name, what goes into it, and where."""

    name: str
    groups: list[SaveGroup]
    frame: Frame


def pack(groups: list[SaveGroup], limit: int) -> list[OutputFile]:
    """Pack groups into files of at most ``limit`` bytes of data, in order; a group is never split."""
    files: list[list[SaveGroup]] = [[]]
    size = 0
    for group in groups:
        if files[-1] and size + group.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(group)
        size += group.nbytes
    total = len(files)
    names = [SINGLE] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    return [
        OutputFile(name, content, frame({k: spec for group in content for k, spec in group.outputs.items()}))
        for name, content in zip(names, files, strict=True)
    ]


def _meta(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
