"""A trained model that a later part of the same batch goes on with, instead of training the same again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence

_wanted: set[str] = set()
_kept: dict[str, tuple[Any, Evidence]] = {}


def trajectory(case: Case) -> str:
    """Return what two cases share that train in the same way: all but the scenario, the test and the file format."""
    options = tuple(pair for pair in case.options if pair[0] not in ("test", "format"))
    return replace(case, scenario="train", options=options).to_json()


def expect(cases: list[Case]) -> None:
    """Say which trained models will be asked for; what was kept before is dropped."""
    _kept.clear()
    _wanted.clear()
    _wanted.update(trajectory(case) for case in cases)


def offer(case: Case, loaded: Any, evidence: Evidence) -> None:
    """Keep a trained model and the evidence of its training, where it is wanted."""
    if (key := trajectory(case)) in _wanted:
        _kept[key] = loaded, evidence


def find(case: Case) -> tuple[Any, Evidence] | None:
    """Return a model that was trained as ``case`` says, and a copy of the evidence of its training."""
    if (found := _kept.get(trajectory(case))) is None:
        return None
    loaded, evidence = found
    return loaded, Evidence(rank=evidence.rank, facts=dict(evidence.facts), tensors=dict(evidence.tensors))
