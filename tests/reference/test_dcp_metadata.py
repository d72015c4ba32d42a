"""Metadata of DCP folders: what its pickles may hold, whichever Python wrote them, and what has to be in it."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.tensor import DTensor, Shard

from fsdp_testkit.reference import dcp
from fsdp_testkit.reference.dcp import Reader, _Plain, single_process
from fsdp_testkit.reference.errors import LoadError

ENCODING = metadata._MEM_FORMAT_ENCODING


class Asks:
    """Is pickled as a call of ``getattr``, as Python 3.11.2 pickles members of enums."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, self.arguments


def load(value: Any) -> Any:
    return _Plain(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize("member", list(ENCODING))
def test_members_of_enums(member: Any) -> None:
    assert load(member) is member
    assert load(Asks(ENCODING, member.name)) is member


@pytest.mark.parametrize(
    "asked",
    [(ENCODING, "__class__"), (ENCODING, "mro"), (metadata.TensorStorageMetadata, "__init__"), ("text", "format")],
)
def test_nothing_else_is_fetched_by_name(asked: tuple[Any, str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr of .* has no place in checkpoint metadata"):
        load(Asks(*asked))


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        ("torch.distributed.checkpoint.metadata", "os", "os has no place"),
        ("torch.distributed.checkpoint.metadata", "torch", "torch has no place"),
        ("torch.distributed.checkpoint.metadata", "dataclass", "dataclass has no place"),
        ("torch.distributed.checkpoint.metadata", "Metadata", "attributes of a type have no place"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "attributes of a EnumType have no place"),
        ("torch.serialization", "_get_layout", "attributes of a function have no place"),
        ("pathlib", "PosixPath", "attributes of a type have no place"),
    ],
)
def test_what_is_shared_cannot_be_changed(module: str, name: str, text: str) -> None:
    """Opcodes by hand: push the object, then set attributes of it, by its dict and by ``setattr``."""
    named = f"c{module}\n{name}\n".encode()
    value = b"}(Vfsync\nI1\nu"  # {"fsync": 1}
    for state in (value, b"(N" + value + b"t"):
        with pytest.raises(pickle.UnpicklingError, match=text):
            _Plain(io.BytesIO(named + state + b"b.")).load()
    assert os.fsync is not None
    assert not hasattr(metadata.Metadata, "fsync")


def saved(folder: Path) -> Path:
    with single_process():
        writer = dist_checkpoint.FileSystemWriter(folder)
        dist_checkpoint.save({"a": torch.arange(12.0).view(4, 3), "b": torch.tensor(2.0)}, storage_writer=writer)
    return folder


def change(folder: Path, edit: Callable[[metadata.Metadata], None]) -> None:
    file = folder / ".metadata"
    content = pickle.loads(file.read_bytes())
    edit(content)
    file.write_bytes(pickle.dumps(content))


def halves(content: metadata.Metadata, second: int) -> None:
    """Describe ``a`` as two chunks of two rows, the second at row ``second``."""
    chunk, entry = metadata.ChunkStorageMetadata, content.state_dict_metadata["a"]
    entry.chunks = [chunk(torch.Size([row, 0]), torch.Size([2, 3])) for row in (0, second)]
    whole = content.storage_data.pop(metadata.MetadataIndex("a", torch.Size([0, 0])))
    for row in (0, second):
        content.storage_data[metadata.MetadataIndex("a", torch.Size([row, 0]))] = whole


def columns(content: metadata.Metadata) -> None:
    """Describe ``a`` as three columns twice."""
    chunk, entry = metadata.ChunkStorageMetadata, content.state_dict_metadata["a"]
    entry.chunks = [chunk(torch.Size([0, column % 3]), torch.Size([4, 1])) for column in range(6)]
    whole = content.storage_data[metadata.MetadataIndex("a", torch.Size([0, 0]))]
    for column in range(3):
        content.storage_data[metadata.MetadataIndex("a", torch.Size([0, column]))] = whole


def nothing(content: metadata.Metadata) -> None:
    content.state_dict_metadata["a"].chunks = []


def elsewhere(content: metadata.Metadata) -> None:
    del content.storage_data[metadata.MetadataIndex("a", torch.Size([0, 0]))]


def scalar(content: metadata.Metadata) -> None:
    content.state_dict_metadata["b"].chunks = []


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (nothing, r"the chunks of 'a' hold 0 elements of 12"),
        (scalar, r"the chunks of 'b' hold 0 elements of 1"),
        (elsewhere, r"the chunk at \(0, 0\) of 'a' lies in no file"),
        (lambda content: halves(content, 3), r"'a' of shape \(4, 3\) has a chunk at \(3, 0\) of shape \(2, 3\)"),
        (columns, r"chunks of 'a' at \(0, 0\) and \(0, 0\) overlap|hold 24 elements"),
        (lambda content: halves(content, 1), r"chunks of 'a' at \(0, 0\) and \(1, 0\) overlap"),
    ],
)
def test_chunks_hold_every_element_once(tmp_path: Path, edit: Any, text: str) -> None:
    folder = saved(tmp_path / "dcp")
    assert set(Reader(folder).read_metadata().state_dict_metadata) == {"a", "b"}
    change(folder, lambda content: halves(content, 2))
    Reader(folder).read_metadata()
    folder = saved(tmp_path / "other")
    change(folder, edit)
    with pytest.raises(LoadError, match=text):
        Reader(folder).read_metadata()


def test_storage_info_is_what_metadata_names() -> None:
    info = filesystem._StorageInfo("file", 0, 1)
    assert load(info) == info


def test_metadata_of_other_releases() -> None:
    """Names of torch before 2.3 and of Python from 3.13 on."""
    assert _Plain(io.BytesIO(b"cpathlib._local\nPosixPath\n(Va\ntR.")).load() == Path("a")
    named = b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n."
    assert _Plain(io.BytesIO(named)).load() is metadata.TensorProperties
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        _Plain(io.BytesIO(b"cpathlib._local\nos\n.")).load()


def test_metadata_may_lack_what_older_releases_do_not_write(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dcp")
    change(folder, lambda content: setattr(content, "storage_meta", None))
    tensors = {"a": torch.zeros(4, 3)}
    reader = Reader(folder)
    dcp.read(folder, tensors, reader)
    dcp.read(folder, tensors, reader)
    assert torch.equal(tensors["a"], torch.arange(12.0).view(4, 3))


def test_rows_of_a_conjugate(tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "SMALL", 0)  # or all of it would be read whole
    value = torch.complex(torch.arange(8.0), torch.ones(8)).view(4, 2).conj()
    with single_process():
        writer = dist_checkpoint.FileSystemWriter(tmp_path)
        dist_checkpoint.save({"a": value}, storage_writer=writer)
    entry = Reader(tmp_path).read_metadata().state_dict_metadata["a"]
    assert tuple(entry.size) == (4, 2)
    wanted = torch.zeros(4, 2, dtype=torch.complex64)
    dcp.read(tmp_path, {"a": wanted})
    assert torch.equal(wanted, value.resolve_conj())
    rows = DTensor.from_local(torch.zeros(1, 2, dtype=torch.complex64), claim(2, 4), [Shard(0)], run_check=False)
    dcp.read(tmp_path, {"a": rows})
    assert torch.equal(rows.to_local(), value.resolve_conj()[2:3])
