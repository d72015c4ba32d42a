"""The line at the top of a session: what is tested, by which versions, on what."""

from __future__ import annotations

import pytest

from fsdp_testkit.core.versions import KIT_VERSION, installed_version
from fsdp_testkit.plugin.options import RUN_OPTIONS, EngineOptions
from fsdp_testkit.reporting.report import gpus


def pytest_report_header(config: pytest.Config) -> str:
    """Return the line."""
    options = config.stash[RUN_OPTIONS]
    engine = options.engine
    models = "all models" if options.models is None else _count(len(options.models))
    parts = [
        f"fsdp_testkit {KIT_VERSION}",
        f"torch {installed_version('torch') or 'missing'}",
        f"transformers {installed_version('transformers') or 'missing'}",
        f"backend {engine.backend}",
        _device(engine),
        f"seed {engine.seed}",
        f"matrix of {models}",
    ]
    if engine.trust_remote_code:
        parts.append("code of model folders is trusted")
    if engine.fault:
        parts.append(f"ARMED FAULT {engine.fault}")
    return ", ".join(parts)


def _device(engine: EngineOptions) -> str:
    if engine.device == "cpu":
        return "cpu (gloo)"
    # ranks beyond the number of GPUs share one, which NCCL refuses
    count = len(gpus())
    return f"cuda (nccl up to {count} ranks, gloo above)" if count else "cuda (no GPU found by the driver)"


def _count(number: int) -> str:
    return f"{number} model" if number == 1 else f"{number} models"
