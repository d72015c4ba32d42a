"""Opening checkpoint files with a reader of the kit's own.

The safetensors layout: 8 bytes little-endian header length, JSON header (name -> dtype, shape,
data_offsets), data. https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

from fsdp_testkit.core.evidence import TensorData
from fsdp_testkit.core.finding import Verdict

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(path: Path) -> dict[str, TensorData]:
    """Return name -> tensor of one file, memory-mapped.

    Raises:
        ValueError: header or offsets do not fit the file.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path.name} has {size} bytes, too few for a safetensors header")
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", view[:8])
    if 8 + length > size:
        raise ValueError(f"{path.name}: the header says {length} bytes, the file has {size}")
    header = json.loads(bytes(view[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, facts in header.items():
        start, stop = (8 + length + offset for offset in facts["data_offsets"])
        if not 8 + length <= start <= stop <= size:
            raise ValueError(f"{path.name}: {name} lies at {facts['data_offsets']}, outside the file")
        tensors[name] = TensorData(_DTYPES[facts["dtype"]], tuple(facts["shape"]), view[start:stop])
    return tensors


def read_checkpoint(folder: Path) -> tuple[dict[str, TensorData], dict[str, list[str]], Verdict]:
    """Read all safetensors files of a folder.

    Returns:
        key -> tensor; key -> names of the files that hold it; a verdict over index, doubles and readability.
    """
    verdict = Verdict.empty()
    tensors: dict[str, TensorData] = {}
    places: dict[str, list[str]] = {}
    files = sorted(folder.glob("*.safetensors"))
    verdict.expect(bool(files), check="files", message=f"no safetensors file in {folder.name}", judged_by="file")
    for file in files:
        try:
            content = read_safetensors(file)
        except (ValueError, KeyError) as error:
            verdict.expect(False, check="files", message=f"{file.name} is unreadable: {error}", judged_by="file")
            continue
        for name, tensor in content.items():
            tensors[name] = tensor
            places.setdefault(name, []).append(file.name)
    for name, owners in places.items():
        verdict.expect(
            len(owners) == 1,
            check="files",
            parameter=name,
            message=f"{name} is stored in {len(owners)} files: {', '.join(owners)}",
            judged_by="file",
        )
    _index(verdict, folder, places)
    return tensors, places, verdict


def _index(verdict: Verdict, folder: Path, places: dict[str, list[str]]) -> None:
    index = folder / "model.safetensors.index.json"
    several = len({owner for owners in places.values() for owner in owners}) > 1
    if not verdict.expect(
        index.exists() or not several,
        check="files",
        message="several safetensors files and no index",
        judged_by="file",
    ):
        return
    if not index.exists():
        return
    mapping = json.loads(index.read_text())["weight_map"]
    wrong = sorted(name for name, owners in places.items() if mapping.get(name) not in owners)
    gone = sorted(mapping.keys() - places.keys())
    verdict.expect(
        not wrong and not gone,
        check="files",
        message=f"the index misplaces {wrong[:3]} and names keys that no file holds: {gone[:3]}",
        judged_by="file",
    )
