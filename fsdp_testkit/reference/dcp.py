"""Reading folders of torch.distributed.checkpoint without trusting their pickles."""

from __future__ import annotations

import enum
import pickle
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fsdp_testkit.reference import adapter, folders
from fsdp_testkit.reference.errors import LoadError, SaveError
from fsdp_testkit.reference.sources import Source

METADATA = ".metadata"


def is_dcp(folder: Path) -> bool:
    """Return whether ``folder`` holds a DCP checkpoint."""
    return (folder / METADATA).is_file()


class _Plain(pickle.Unpickler):
    """Unpickles DCP metadata: its own dataclasses and torch's value types, no other class or function."""

    ALLOWED = (
        ("torch.distributed.checkpoint.metadata", None),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._C", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        allowed = any(module == m and (n is None or name == n) for m, n in self.ALLOWED)
        if "." in name or not (dtype or allowed):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")
        return super().find_class(module, name)


def _member(owner: Any, name: Any) -> enum.Enum:
    """Return a member of an enum: what ``getattr`` is for in pickles of some Python releases, such as 3.11.2."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"builtins.getattr of {owner!r} and {name!r} has no place in checkpoint metadata")
    return owner[name]


class Reader(dist_checkpoint.FileSystemReader):  # type: ignore[misc]  # torch's classes are untyped here
    """A `FileSystemReader` whose metadata holds nothing but metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Return the folder's metadata.

        Raises:
            LoadError: the file is damaged, or holds anything else.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Plain(file).load()
            entries = dict(metadata.state_dict_metadata)
            for info in metadata.storage_data.values():
                name = info.relative_path
                if Path(name).name != name or not (Path(self.path) / name).is_file():
                    raise LoadError(f"{path} names the file {name!r}, which is not in its folder")
        except LoadError:
            raise
        except Exception as error:  # unpickling garbage raises anything
            raise LoadError(f"{path} is not readable as DCP metadata: {type(error).__name__}: {error}") from None
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise LoadError(f"{path}: {name!r} is no tensor, and objects are not unpickled")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = self.storage_meta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def single_process() -> Iterator[None]:
    """Silence the warning that torch gives when DCP is told, on purpose, to work without collectives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Planner(dist_checkpoint.DefaultSavePlanner):  # type: ignore[misc]  # torch's classes are untyped here
    """Fetches offloaded tensors when their turn to be written comes, one at a time."""

    def __init__(self, fetch: dict[str, Callable[[], torch.Tensor]]) -> None:
        super().__init__()
        self._fetch = fetch

    def lookup_object(self, index: Any) -> Any:
        """Return the tensor of a write item."""
        return self._fetch[index.fqn]() if index.fqn in self._fetch else super().lookup_object(index)


def write(folder: Path, sources: dict[str, Source], *, durable: bool) -> None:
    """Write tensors to a DCP folder; all ranks together if there is a process group.

    Raises:
        SaveError: a rank could not write; all ranks raise.
    """
    writer = dist_checkpoint.FileSystemWriter(folder, sync_files=durable)
    tensors = {name: source.tensor.detach() for name, source in sources.items()}
    planner = _Planner({name: source.fetch for name, source in sources.items() if source.fetch is not None})
    try:
        with single_process():
            dist_checkpoint.save(tensors, storage_writer=writer, planner=planner, no_dist=not folders.distributed())
    except dist_checkpoint.CheckpointException as error:  # a BaseException, which no caller expects
        raise SaveError(f"{folder} cannot be written as a DCP checkpoint: {error}") from error


def read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors`` (plain or `DTensor`, real) from a DCP folder; each rank reads for itself.

    Raises:
        LoadError: a file is missing or damaged.
    """
    try:
        with single_process():
            # every rank plans for itself: no collective, so a rank that fails keeps nobody waiting
            dist_checkpoint.load(tensors, storage_reader=Reader(folder), no_dist=True)
    except LoadError:
        raise
    except (Exception, dist_checkpoint.CheckpointException) as error:  # the latter is a BaseException
        raise LoadError(f"{folder} cannot be read as a DCP checkpoint: {error}") from error


class DcpCheckpoint:
    """The tensors of a DCP folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        entries = Reader(folder).read_metadata().state_dict_metadata
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        self.digest = zlib.crc32((folder / METADATA).read_bytes())

    def table(self) -> list[Any]:
        """Return what another process needs to know of the checkpoint without opening it: plain data."""
        return [[name, str(self.dtypes[name]), list(shape)] for name, shape in self.shapes.items()]

    @classmethod
    def described(cls, folder: Path, table: list[Any]) -> DcpCheckpoint:
        """Return a checkpoint that is known by its `table` alone: it has names, dtypes and shapes, and no data."""
        made = cls.__new__(cls)
        made.folder, made.digest = folder, 0
        made.shapes = {name: tuple(shape) for name, _, shape in table}
        made.dtypes = {name: getattr(torch, dtype.removeprefix("torch.")) for name, dtype, _ in table}
        return made

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self.shapes)

    def compare(self, model: Any) -> list[str]:
        """Return what does not fit the unsharded meta ``model``."""
        expected = dict(model.state_dict())
        tied: dict[int, list[str]] = defaultdict(list)
        for name, tensor in model.state_dict(keep_vars=True).items():
            tied[id(tensor)].append(name)
        covered = {name for group in tied.values() if not self.names.isdisjoint(group) for name in group}
        missing, unexpected = adapter.filter_keys(model, set(expected) - covered, self.names - set(expected))
        problems = [f"missing key {name!r} {tuple(expected[name].shape)}" for name in sorted(missing)]
        problems += [f"unexpected key {name!r}" for name in sorted(unexpected)]
        for group in tied.values():
            if len(both := sorted(self.names.intersection(group))) > 1:
                problems.append(f"doubled key {both[0]!r}: tied to {both[1]!r}, and both are in the checkpoint")
        for name in sorted(self.names & set(expected)):
            if self.shapes[name] != tuple(expected[name].shape):
                shapes = f"{self.shapes[name]} in the checkpoint, {tuple(expected[name].shape)} in the model"
                problems.append(f"mismatched shape of {name!r}: {shapes}")
        return problems

    def read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill ``tensors``, see `read`."""
        read(self.folder, tensors)
