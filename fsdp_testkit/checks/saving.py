"""Saved checkpoints: what the files hold, and what comes back from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import assemble, expected_part, first_row, same_bits, shard_dim
from fsdp_testkit.checks.files import read_checkpoint
from fsdp_testkit.checks.signature import signature
from fsdp_testkit.core.evidence import Array, Evidence, TensorData
from fsdp_testkit.core.finding import Finding, Verdict
from fsdp_testkit.core.layout import Layout

#: Bytes that collectives may bring to a rank while it saves: each value once, with room for padding to even shards
#: and for what is said about the files.
TRAFFIC_FACTOR = 1.5
TRAFFIC_SLACK = 65536
#: Bytes of an element of the models that are saved.
WIDEST = 4


def trained_weights(evidences: list[Evidence], layout: Layout, prefix: str = "final/") -> dict[str, TensorData]:
    """Assemble full tensors from the raw local shards of the first replica, by the chunk rule."""
    full: dict[str, TensorData] = {}
    ranks = sorted(evidences, key=lambda item: item.rank)[: layout.shard]
    for name, first in ranks[0].under(prefix):
        facts = ranks[0].facts["parameters"].get(name, {})
        parts = [rank.tensors[f"{prefix}{name}"] for rank in ranks if f"{prefix}{name}" in rank.tensors]
        if not facts.get("dtensor", False):
            full[name] = first
            continue
        bits = assemble([part.bits() for part in parts if part.numel] or [first.bits()], shard_dim(facts))
        full[name] = TensorData(first.dtype, tuple(facts["shape"]), np.ascontiguousarray(bits).tobytes())
    return full


def check_traffic(evidences: list[Evidence]) -> Verdict:
    """Judge that a save brings each value to a rank at most once: an index into a sharded tensor gathers all of it."""
    verdict = Verdict.empty()
    for evidence in evidences:
        traffic = evidence.facts["traffic"]
        sizes = [math.prod(facts["shape"]) for facts in evidence.facts["parameters"].values()]
        whole = WIDEST * sum(sizes)
        bound = TRAFFIC_FACTOR * whole + TRAFFIC_SLACK
        calls = ", ".join(f"{count} {name}" for name, count in sorted(traffic["calls"].items()))
        verdict.expect(
            traffic["received"] <= bound,
            check="traffic",
            rank=evidence.rank,
            message=f"saving brought {traffic['received']:,} bytes to this rank, of a model of {sum(sizes):,} elements "
            f"({calls}): the same values were gathered more than once",
            expected=f"at most {bound:,} bytes",
            actual=f"{traffic['received']:,} bytes",
        )
    return verdict


def check_files(folder: Path, reference: Path, tied: bool) -> Verdict:
    """Judge a saved folder against a single-process ``save_pretrained`` of the same model type.

    Keys, dtypes and shapes must be the same, a tied weight is stored once, nothing is extra. Values are
    judged through a plain reload, since stored values may be converted.
    """
    tensors, _, verdict = read_checkpoint(folder)
    wanted, _, _ = read_checkpoint(reference)
    where: dict[str, Any] = {"check": "files", "judged_by": "file"}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    verdict.expect(
        not missing,
        message=f"{len(missing)} keys that a single-process save writes are missing: {', '.join(missing[:5])}",
        expected=f"{len(wanted)} keys",
        actual=f"{len(tensors)} keys",
        parameter=missing[0] if missing else "",
        **where,
    )
    verdict.expect(
        not extra,
        message=f"{len(extra)} extra keys"
        + (" (a tied weight stored twice?)" if tied and extra else "")
        + f": {', '.join(extra[:5])}",
        expected=f"{len(wanted)} keys",
        actual=f"{len(tensors)} keys",
        parameter=extra[0] if extra else "",
        **where,
    )
    for name in wanted.keys() & tensors.keys():
        left, right = tensors[name], wanted[name]
        verdict.expect(
            left.dtype == right.dtype and left.shape == right.shape,
            parameter=name,
            message=f"{name} is stored as {left.dtype} {list(left.shape)} instead of {right.dtype} {list(right.shape)}",
            expected=f"{right.dtype} {list(right.shape)}",
            actual=f"{left.dtype} {list(left.shape)}",
            **where,
        )
    verdict.expect(
        (folder / "config.json").exists(),
        message="config.json is missing: plain from_pretrained cannot read the folder",
        **where,
    )
    return verdict


def check_reload(evidences: list[Evidence], full: dict[str, TensorData], layout: Layout, where_loaded: str) -> Verdict:
    """Judge weights after a load: bit-equal to ``full`` (this rank's rows of it), same names, nothing else."""
    verdict = Verdict.empty()
    for evidence in evidences:
        found = {name for name, _ in evidence.under("weight/")}
        base: dict[str, Any] = {
            "check": "reload",
            "rank": evidence.rank,
            "judged_by": f"saved weights ({where_loaded})",
        }
        for name in sorted(full.keys() ^ found):
            verdict.expect(
                False,
                parameter=name,
                message=f"after loading {where_loaded}, {name} is {'missing' if name in full else 'extra'}",
                **base,
            )
        for name in full.keys() & found:
            actual, facts = evidence.tensors[f"weight/{name}"], evidence.facts["parameters"][name]
            bits: Array = full[name].bits()
            if facts["dtensor"]:
                bits = expected_part(bits, layout, evidence.rank, shard_dim(facts))
            expected = TensorData(full[name].dtype, tuple(bits.shape), np.ascontiguousarray(bits).tobytes())
            verdict.tensors += 1
            verdict.checks += 1
            if not same_bits(actual, expected) and (actual.numel or expected.numel):
                message = f"after loading {where_loaded}, {name} differs from what was saved{_how(actual, expected)}"
                whole, first = None, 0
                if facts["dtensor"]:
                    whole = full[name].array()
                    first = first_row(whole, layout, evidence.rank, shard_dim(facts))
                detail = _detail(actual, expected, whole, first)
                verdict.findings.append(Finding(message=message, parameter=name, detail=detail, **base))
    return verdict


def check_buffers_kept(saved: Evidence, loaded: list[Evidence], where_loaded: str) -> Verdict:
    """Buffers after a load equal those at the time of saving, bit for bit."""
    verdict = Verdict.empty()
    for evidence in loaded:
        for name, tensor in saved.under("buffer/"):
            verdict.tensors += 1
            other = evidence.tensors.get(f"buffer/{name}")
            verdict.expect(
                other is not None and same_bits(other, tensor),
                check="reload",
                rank=evidence.rank,
                parameter=name,
                message=f"after loading {where_loaded}, buffer {name} differs from the one that was saved",
                judged_by="saved buffers",
            )
    return verdict


def check_trained(evidences: list[Evidence]) -> Verdict:
    """The weights that are saved are not those that were loaded: a stale save would be invisible."""
    verdict = Verdict.empty()
    for evidence in evidences:
        moved = [
            name
            for name, tensor in evidence.under("final/")
            if tensor.numel and bytes(tensor.data) != bytes(evidence.tensors[f"initial/{name}"].data)
        ]
        verdict.expect(
            bool(moved),
            check="trained_before_save",
            rank=evidence.rank,
            message="no weight of this rank moved before the save, so a stale save would pass",
        )
    return verdict


def check_loading_info(evidence: Evidence) -> Verdict:
    """A plain ``from_pretrained`` of the saved folder reports nothing missing, unexpected or mismatched."""
    verdict = Verdict.empty()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = evidence.facts["loading_info"].get(kind, [])
        verdict.expect(
            not found,
            check="files",
            message=f"plain from_pretrained reports {kind}: {', '.join(found[:5])}",
            judged_by="file",
        )
    return verdict


def _detail(actual: TensorData, expected: TensorData, whole: Array | None, first: int) -> dict[str, Any]:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return {}
    right = expected.array()
    return signature(actual.array(), right, full=right if whole is None else whole, first=first)


def _how(actual: TensorData, expected: TensorData) -> str:
    if actual.shape != expected.shape:
        return f": shape {list(actual.shape)} instead of {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f": dtype {actual.dtype} instead of {expected.dtype}"
    left, right = actual.array().astype(np.float64), expected.array().astype(np.float64)
    if np.isnan(left).any():
        return f": {int(np.isnan(left).sum())} of {left.size} values are NaN (memory that nothing filled)"
    return f": {int((left != right).sum())} of {left.size} values, by up to {np.abs(left - right).max():.3g}"
