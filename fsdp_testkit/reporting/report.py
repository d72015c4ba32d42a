"""The JSON report: where it was run, and all rows. Written to a neighbouring file and moved into place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.result import OUTCOMES, SCHEMA, Result
from fsdp_testkit.core.versions import KIT_VERSION, installed_version

_DISTRIBUTIONS = ("torch", "transformers", "numpy", "safetensors", "pytest", "pytest-xdist")


def environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, hardware and options. Imports none of the packages that it names."""
    return {
        "fsdp_testkit": KIT_VERSION,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in _DISTRIBUTIONS},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": _memory(),
        "gpus": gpus(),
        "options": dict(options),
    }


def report_document(rows: Iterable[Result], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report as plain data; rows are sorted, and numbers that JSON lacks become text."""
    ordered = sorted(rows, key=cell)
    return {
        "schema": SCHEMA,
        "environment": environment(options),
        "results": [_finite(row.to_dict()) for row in ordered],
    }


def cell(row: Result) -> tuple[str, ...]:
    """Return what identifies a row."""
    return (row.model_type, row.test, row.variant, row.layout, row.backend, str(row.extra.get("item", "")))


def check_target(path: Path) -> None:
    """Refuse a path that could not be written at the end, by writing beside it now.

    Raises:
        UsageError: a folder, a device, a read-only file, or a folder that is missing or cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"report={str(path)!r} must be a file; it is a folder")
    if path.exists():
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"report={str(path)!r} must be a regular file")
        # root may write anything, so the permission bits are asked and not the system
        if not mode & 0o222 or not os.access(path, os.W_OK):
            raise UsageError(f"report={str(path)!r} must be a file that can be written; it is read-only")
    if not path.parent.is_dir():
        raise UsageError(f"report={str(path)!r}: the folder {path.parent} does not exist")
    try:
        write_atomically(path, None)
    except OSError as error:
        raise UsageError(f"report={str(path)!r} cannot be written: {error.strerror or error}") from None


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Replace ``path`` by the document in one step; on any error the old file stays as it was.

    Raises:
        OSError: the disk is full or the folder went away.
    """
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str | None) -> None:
    """Write ``text`` beside ``path`` and move it there; ``None`` tries the writing and leaves no trace."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text if text is not None else "\n")
            file.flush()
            # without it a full disk may show only after the old report is gone
            os.fsync(file.fileno())
        if text is not None:
            # mkstemp makes files that only their owner reads
            mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
            Path(name).chmod(mode)
            Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def read_report(path: Path) -> dict[str, Any]:
    """Read a report written by `write_report`.

    Raises:
        UsageError: the file is missing, is no report, or has another schema.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"report {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"report {path} cannot be read: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"report {path} has schema {schema!r}; it must be {SCHEMA!r}")
    results = document.get("results")
    if not isinstance(results, list):
        raise UsageError(f"report {path} has no list of results")
    for number, raw in enumerate(results):
        if not isinstance(raw, dict) or raw.get("outcome") not in OUTCOMES:
            raise UsageError(f"report {path}: result {number} is no row with an outcome")
    return document


def merge_reports(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one report over several: a cell that two hold is taken from the later one.

    The environment is the first one's, with those of all reports under ``merged``.
    """
    parts = list(documents)
    rows: dict[tuple[str, ...], Result] = {}
    for part in parts:
        for raw in part["results"]:
            row = Result(**raw)
            rows[cell(row)] = row
    environments = [part["environment"] for part in parts]
    return {
        "schema": SCHEMA,
        "environment": {**environments[0], "merged": environments},
        "results": [row.to_dict() for _, row in sorted(rows.items(), key=lambda pair: pair[0])],
    }


def gpus() -> list[str]:
    """Return the names of NVIDIA GPUs that the driver lists; needs no torch."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                names.append(value.strip())
    return names


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _umask() -> int:
    # there is no way to read it without setting it
    value = os.umask(0o022)
    os.umask(value)
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
