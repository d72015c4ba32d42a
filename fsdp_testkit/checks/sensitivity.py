"""How far the numbers of a case move when its weights move by a unit in the last place.

Where a model's own function is not smooth (a square root near zero, a route that flips) rounding is amplified without
bound, on one process as on many. The spread of truth's own runs from weights that differ by rounding is what such a
model's numbers are worth; Higham, Accuracy and Stability of Numerical Algorithms (2002), section 1.6, calls the ratio
of the two the condition number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fsdp_testkit.checks.training import scale_floors
from fsdp_testkit.core.evidence import Array, Evidence

#: (check, parameter) -> step -> largest relative distance from truth. The parameter is "" for losses and norms, the
#: step ``None`` for what is compared at the end.
Spread = dict[tuple[str, str], dict[int | None, float]]

#: What stands under a prefix of truth's tensors -> checks that compare it.
_CHECKS = {
    "gradient": ("gradients",),
    "final": ("weights", "gathered_weights"),
    "optimizer": ("optimizer",),
}


def spread(truth: Evidence, others: Sequence[Evidence]) -> Spread:
    """Return by how much ``others``, truth's runs from nearly the same weights, differ from ``truth``.

    Distances are relative to the same scales as in `fsdp_testkit.checks.training.check_training`.
    """
    found: Spread = {}

    def note(check: str, parameter: str, step: int | None, distance: float) -> None:
        steps_of = found.setdefault((check, parameter), {})
        steps_of[step] = max(steps_of.get(step, 0.0), distance)

    steps = truth.facts["losses"]
    floors, moments = scale_floors(truth, len(steps))
    for other in others:
        for step in steps:
            for check, fact in (("losses", "losses"), ("gradient_norm", "norms")):
                wanted, other_value = np.array(truth.facts[fact][step]), np.array(other.facts[fact][step])
                note(check, "", int(step), _distance(wanted, other_value))
        for key, tensor in truth.tensors.items():
            prefix, _, rest = key.partition("/")
            if prefix not in _CHECKS or key not in other.tensors:
                continue
            name, floor, at = rest, 0.0, None
            if prefix == "gradient":
                step, _, name = rest.partition("/")
                at = int(step)
                floor = floors[at]
            elif prefix == "optimizer":
                name, _, kind = rest.rpartition("/")
                floor = moments.get(kind, 0.0)
            for check in _CHECKS[prefix]:
                note(check, name, at, _distance(tensor.array(), other.tensors[key].array(), floor))
    return found


def _distance(wanted: Array, other: Array, floor: float = 0.0) -> float:
    scale = max(float(np.max(np.abs(wanted), initial=0.0)), floor)
    return float(np.max(np.abs(other - wanted), initial=0.0)) / scale if scale else 0.0
