"""Reading folders of torch.distributed.checkpoint without trusting their pickles."""

from __future__ import annotations

import enum
import io
import math
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dist_checkpoint
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import adapter, folders
from fsdp_testkit.reference.errors import LoadError, SaveError
from fsdp_testkit.reference.sources import Source

METADATA = ".metadata"
#: Bytes of a stored chunk that is read whole even where a part of it is wanted: to find the part takes longer.
SMALL = 16384


def is_dcp(folder: Path) -> bool:
    """Return whether ``folder`` holds a DCP checkpoint."""
    return (folder / METADATA).is_file()


class _Plain(pickle._Unpickler):
    """Unpickles DCP metadata: its own dataclasses and torch's value types, no other class or function.

    It is the unpickler in Python: the one in C would let a pickle set attributes of whatever it may name, of classes
    and functions too, and so change them for the whole process.
    """

    #: Where other releases keep what metadata consists of: torch before 2.3, and Python from 3.13 on.
    MOVED: ClassVar[dict[str, str]] = {
        "torch.distributed._shard.sharded_tensor.metadata": checkpoint_metadata.__name__,
        "pathlib._local": "pathlib",
    }
    ALLOWED = (
        (adapter.StorageInfo.__module__, adapter.StorageInfo.__name__),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._C", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function that metadata consists of."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        module = self.MOVED.get(module, module)
        name = "_MEM_FORMAT_ENCODING" if name == "MEM_FORMAT_ENCODING" else name
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        own = module == checkpoint_metadata.__name__ and _is_own(getattr(checkpoint_metadata, name, None))
        if "." in name or not (dtype or own or (module, name) in self.ALLOWED):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")
        return super().find_class(module, name)

    def set_state(self) -> None:
        """Give an object its attributes, if it is one of the dataclasses."""
        owner = type(self.stack[-2])  # type: ignore[attr-defined]  # the stubs leave it out
        if not (_is_own(owner) or owner is adapter.StorageInfo) or issubclass(owner, enum.Enum):
            raise pickle.UnpicklingError(f"attributes of a {owner.__name__} have no place in checkpoint metadata")
        self.load_build()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: set_state}


def _is_own(value: Any) -> bool:
    """Return whether a class is defined where torch defines a checkpoint's metadata."""
    return isinstance(value, type) and value.__module__ == checkpoint_metadata.__name__


def _member(owner: Any, name: Any) -> enum.Enum:
    """Return a member of an enum: what ``getattr`` is for in pickles of some Python releases, such as 3.11.2."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"builtins.getattr of {owner!r} and {name!r} has no place in checkpoint metadata")
    return owner[name]


class Reader(dist_checkpoint.FileSystemReader):  # type: ignore[misc]  # torch's classes are untyped here
    """A `FileSystemReader` whose metadata holds nothing but metadata, and which reads parts of larger chunks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Any = None
        self._sizes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Return the folder's metadata, which is read once.

        Raises:
            LoadError: the file is damaged, or holds anything else.
        """
        if self._metadata is not None:
            self._metadata.storage_meta.load_id = self.load_id
            return self._metadata
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Plain(file).load()
            entries = dict(metadata.state_dict_metadata)
            stored = dict(metadata.storage_data)
            for name in {info.relative_path for info in stored.values()}:
                if Path(name).name != name or not (Path(self.path) / name).is_file():
                    raise LoadError(f"{path} names the file {name!r}, which is not in its folder")
        except LoadError:
            raise
        except Exception as error:  # unpickling garbage raises anything
            raise LoadError(f"{path} is not readable as DCP metadata: {type(error).__name__}: {error}") from None
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise LoadError(f"{path}: {name!r} is no tensor, and objects are not unpickled")
            _check_chunks(path, name, entry, stored)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._metadata = metadata
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Fill the tensors of a plan: of a larger chunk, only the rows that are wanted, where torch reads all of it."""
        left = [item for item in plan.items if not self._read_rows(item, planner)]
        return super().read_data(replace(plan, items=left), planner)

    def _read_rows(self, item: Any, planner: Any) -> bool:
        """Read some rows of a chunk; return whether it could be done, and was wanted."""
        info = self.storage_data[item.storage_index]
        wanted, first = tuple(item.lengths), item.storage_offsets[0] if item.storage_offsets else 0
        if not wanted or info.length <= SMALL or getattr(info, "transform_descriptors", None):
            return False
        name = item.storage_index.fqn
        if name not in self._sizes:
            chunks = self._metadata.state_dict_metadata[name].chunks
            self._sizes[name] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        sizes = self._sizes[name][tuple(item.storage_index.offset)]
        if wanted == sizes or wanted[1:] != sizes[1:]:
            return False
        with (Path(self.path) / info.relative_path).open("rb") as file:
            archive = io.BufferedReader(_Part(file, info.offset, info.length))
            found = _stored(archive)
            if found is None or tuple(found.tensor.shape) != sizes:
                return False
            row = math.prod(sizes[1:]) * found.tensor.itemsize
            archive.seek(found.start + first * row)
            target = planner.resolve_tensor(item).detach()
            direct = target.device.type == "cpu" and target.dtype == found.tensor.dtype and target.is_contiguous()
            rows = target if direct else torch.empty(wanted, dtype=found.tensor.dtype)
            if rows.numel() and archive.readinto(rows.view(-1).view(torch.uint8).numpy()) != rows.nbytes:
                raise LoadError(f"{file.name} is too short for {name!r}")
        if not direct:
            target.copy_(rows)
        planner.commit_tensor(item, target)
        return True


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, up to the end of the part."""
        self._file.seek(self._offset + self._place)
        count: int = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._place)])
        self._place += count
        return count


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as ``torch.save`` writes it: its shape and dtype (no values), and where its bytes start."""

    tensor: torch.Tensor
    start: int


def _stored(archive: Any) -> _Stored | None:
    """Return where the tensor of an archive lies; ``None`` where its bytes are not its elements in order."""
    with zipfile.ZipFile(archive) as listed:
        records = {entry.filename.partition("/")[2]: entry for entry in listed.infolist()}
        data = records.get("data/0")
        if data is None or "data/1" in records or data.compress_type != zipfile.ZIP_STORED:
            return None
        if "byteorder" in records and listed.read(records["byteorder"]) != sys.byteorder.encode():
            return None
    archive.seek(0)
    with torch.serialization.skip_data():
        tensor = torch.load(archive, map_location="cpu", weights_only=True)
    if not (type(tensor) is torch.Tensor and tensor.is_contiguous()) or tensor.storage_offset():
        return None
    if tensor.nbytes > data.file_size or tensor.is_conj() or tensor.is_neg():
        return None
    archive.seek(data.header_offset)
    header = archive.read(30)  # the local header: names and padding of their own lengths follow
    return _Stored(tensor, data.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])))


def _check_chunks(path: Path, name: str, entry: TensorStorageMetadata, stored: dict[Any, Any]) -> None:
    """Raise unless a tensor's chunks hold each of its elements once: what no chunk holds would never be filled."""
    shape = tuple(entry.size)
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    for offsets, sizes in boxes:
        fits = len(offsets) == len(sizes) == len(shape) and all(
            start >= 0 and size >= 0 and start + size <= whole
            for start, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not fits:
            raise LoadError(f"{path}: {name!r} of shape {shape} has a chunk at {offsets} of shape {sizes}")
        if MetadataIndex(name, torch.Size(offsets)) not in stored:
            raise LoadError(f"{path}: the chunk at {offsets} of {name!r} lies in no file")
    # along the axis that is cut into the most pieces, few boxes lie side by side
    axis = max(range(len(shape)), key=lambda axis: len({offsets[axis] for offsets, _ in boxes}), default=0)
    boxes = sorted((box for box in boxes if math.prod(box[1])), key=lambda box: box[0][axis : axis + 1])
    held = sum(math.prod(sizes) for _, sizes in boxes)
    if held != math.prod(shape):
        raise LoadError(f"{path}: the chunks of {name!r} hold {held} elements of {math.prod(shape)}")
    for index, (offsets, sizes) in enumerate(boxes):
        for others, lengths in boxes[index + 1 :]:
            if shape and others[axis] >= offsets[axis] + sizes[axis]:
                break  # sorted by this axis: nor do those after it reach back
            if all(
                mine < other + length and other < mine + size
                for mine, size, other, length in zip(offsets, sizes, others, lengths, strict=True)
            ):
                raise LoadError(f"{path}: chunks of {name!r} at {offsets} and {others} overlap")


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
    """Write tensors to a DCP folder; all ranks together if there is a process group. Plain tensors are rank 0's.

    Raises:
        SaveError: a rank could not write; all ranks raise.
    """
    writer = dist_checkpoint.FileSystemWriter(folder, sync_files=durable)
    # given by all ranks, a plain tensor would be taken from any of them: whose turn it is to write
    mine = {n: source for n, source in sources.items() if folders.rank() == 0 or isinstance(source.tensor, DTensor)}
    tensors = {name: source.tensor.detach() for name, source in mine.items()}
    planner = _Planner({name: source.fetch for name, source in mine.items() if source.fetch is not None})
    try:
        with single_process():
            dist_checkpoint.save(tensors, storage_writer=writer, planner=planner, no_dist=not folders.distributed())
    except dist_checkpoint.CheckpointException as error:  # a BaseException, which no caller expects
        raise SaveError(f"{folder} cannot be written as a DCP checkpoint: {error}") from error


def read(folder: Path, tensors: dict[str, torch.Tensor], reader: Reader | None = None) -> None:
    """Fill ``tensors`` (plain or `DTensor`, real) from a DCP folder; each rank reads for itself.

    Args:
        folder: the folder.
        tensors: by name.
        reader: one that has read the folder's metadata already.

    Raises:
        LoadError: a file is missing or damaged.
    """
    try:
        with single_process():
            # every rank plans for itself: no collective, so a rank that fails keeps nobody waiting
            dist_checkpoint.load(tensors, storage_reader=reader or Reader(folder), no_dist=True)
    except LoadError:
        raise
    except (Exception, dist_checkpoint.CheckpointException) as error:  # the latter is a BaseException
        raise LoadError(f"{folder} cannot be read as a DCP checkpoint: {error}") from error


class DcpCheckpoint:
    """The tensors of a DCP folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader: Reader | None = Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
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
        made.folder, made.digest, made._reader = folder, 0, None
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
        read(self.folder, tensors, self._reader)
