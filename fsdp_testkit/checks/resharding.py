"""State that was saved on some ranks and restored on others, element by element; a model after it was saved."""

from __future__ import annotations

from typing import Any

import numpy as np

from fsdp_testkit.checks.compare import expected_part, same_bits, shard_dim
from fsdp_testkit.checks.saving import trained_weights
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout

PREFIX = "optimizer/"


def full_state(evidences: list[Evidence], layout: Layout) -> dict[str, TensorData]:
    """Assemble the optimizer's tensors, ``parameter/key``, from the shards that each rank saved."""
    full: dict[str, TensorData] = {}
    for key in sorted({name.rpartition("/")[2] for name, _ in evidences[0].under(PREFIX)}):
        views = [
            Evidence(
                rank=evidence.rank,
                facts=evidence.facts,
                tensors={
                    f"state/{name.removesuffix(f'/{key}')}": tensor
                    for name, tensor in evidence.under(PREFIX)
                    if name.endswith(f"/{key}")
                },
            )
            for evidence in evidences
        ]
        full |= {f"{name}/{key}": tensor for name, tensor in trained_weights(views, layout, "state/").items()}
    return full


def check_restored(saved: list[Evidence], full: dict[str, TensorData], loaded: list[Evidence], at: Layout) -> Verdict:
    """Judge an optimizer after resharding: this rank's rows of what was saved, bit for bit, and the same numbers."""
    verdict = Verdict.empty()
    verdict.expect(
        bool(full), check="restored_optimizer", message="the optimizer had no state to save", judged_by="saved state"
    )
    for evidence in loaded:
        where: dict[str, Any] = {"check": "restored_optimizer", "rank": evidence.rank, "judged_by": "saved state"}
        found = dict(evidence.under(PREFIX))
        for name in sorted(full.keys() ^ found.keys()):
            word = "missing" if name in full else "extra"
            message = f"restored at {at}, the optimizer's {name} is {word}"
            verdict.expect(False, parameter=name, message=message, **where)
        for name in full.keys() & found.keys():
            verdict.tensors += 1
            verdict.expect(
                same_bits(found[name], part_of(full[name], evidence, name.rpartition("/")[0], at)),
                parameter=name,
                message=f"restored at {at}, the optimizer's {name} is not what was saved",
                **where,
            )
        for name, before, after in (
            ("step counts", saved[0].facts["optimizer"]["scalars"], evidence.facts["optimizer"]["scalars"]),
            ("groups", saved[0].facts["optimizer"]["groups"], evidence.facts["optimizer"]["groups"]),
            ("learning rates", saved[0].facts["rates"], evidence.facts["rates"]),
        ):
            message = f"restored at {at}, the {name} are not those that were saved"
            verdict.expect(before == after, message=message, expected=str(before), actual=str(after), **where)
    return verdict


def part_of(full: TensorData, evidence: Evidence, parameter: str, at: Layout) -> TensorData:
    """Return what a rank has to hold of a tensor that is sharded as a parameter is."""
    facts = evidence.facts["parameters"][parameter]
    bits = full.bits()
    if facts["dtensor"]:
        bits = expected_part(bits, at, evidence.rank, shard_dim(facts))
    return TensorData(full.dtype, tuple(bits.shape), np.ascontiguousarray(bits).tobytes())


def check_unharmed(evidences: list[Evidence]) -> Verdict:
    """Judge that saving left the model as it was, wherever its weights lie."""
    verdict = Verdict.empty()
    for evidence in evidences:
        where: dict[str, Any] = {"check": "after_save", "rank": evidence.rank, "judged_by": "weights before the save"}
        before, after = evidence.facts["loss"]
        message = "after the save, the same batch has another loss"
        verdict.expect(before == after, message=message, expected=str(before), actual=str(after), **where)
        for name, tensor in evidence.under("final/"):
            verdict.tensors += 1
            other = evidence.tensors.get(f"weight/{name}")
            verdict.expect(
                other is not None and same_bits(other, tensor),
                parameter=name,
                message=f"after the save, {name} is no longer what it was in memory",
                **where,
            )
    return verdict
