"""The matrix as a process of its own, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class MatrixRun:
    """How a run of the matrix ended.

    Attributes:
        status: pytest's exit status.
        results: rows of its report; none where it wrote none.
        seconds: of wall time.
        log: file with what it printed.
    """

    status: int
    results: list[dict[str, Any]]
    seconds: float
    log: Path


def run_matrix(report: Path, *, models: str, seed: int, workers: int, more: Sequence[str] = ()) -> MatrixRun:
    """Run the matrix once.

    Args:
        report: JSON file that it writes; an older one is deleted. The log goes beside it.
        models: what ``--fsdp-models`` takes.
        seed: what ``--fsdp-seed`` takes.
        workers: of xdist.
        more: further arguments of pytest.
    """
    report = report.resolve()
    report.unlink(missing_ok=True)
    log = report.with_suffix(".log")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "model_matrix"]
    command += ["--fsdp-models", models, "--fsdp-seed", str(seed), "--fsdp-report", str(report), *more]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    results = json.loads(report.read_text(encoding="utf-8"))["results"] if report.exists() else []
    return MatrixRun(status, results, time.monotonic() - begun, log)
