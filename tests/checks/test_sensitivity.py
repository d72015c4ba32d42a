"""What rounding does to truth itself."""

from __future__ import annotations

import numpy as np
import pytest

from fsdp_testkit.checks.sensitivity import spread
from fsdp_testkit.core.evidence import Evidence, TensorData


def truth(scale: float = 1.0, loss: float = 2.0) -> Evidence:
    def data(*values: float) -> TensorData:
        array = np.array(values, dtype=np.float32)
        return TensorData("float32", array.shape, array.tobytes())

    tensors = {
        "initial/w": data(1.0, 2.0),
        "gradient/0/w": data(4.0 * scale, 8.0),
        "gradient/0/small": data(1e-6 * scale, 0.0),
        "final/w": data(1.0 * scale, 2.0),
        "optimizer/w/exp_avg": data(0.5 * scale, 0.0),
    }
    return Evidence(rank=0, facts={"losses": {"0": [[loss], [1.0]]}, "norms": {"0": 3.0 * scale}}, tensors=tensors)


def test_distances_are_relative_and_the_largest_counts() -> None:
    found = spread(truth(), [truth(1.01), truth(0.98, loss=2.2), truth()])
    assert found["losses", ""][0] == pytest.approx(0.1)
    assert found["gradient_norm", ""][0] == pytest.approx(0.02)
    assert found["gradients", "w"][0] == pytest.approx(0.01, rel=1e-4)
    assert found["weights", "w"][None] == found["gathered_weights", "w"][None] == pytest.approx(0.01, rel=1e-4)
    assert found["optimizer", "w"][None] == pytest.approx(0.02, rel=1e-4)
    # against the floor of a gradient that is far below the largest
    assert found["gradients", "small"][0] == pytest.approx(2e-8 / 8e-3, rel=1e-3)
    assert not any(name == "initial" for name, _ in found)


def test_equal_runs_have_no_spread() -> None:
    found = spread(truth(), [truth(), truth()])
    assert {distance for steps in found.values() for distance in steps.values()} == {0.0}
