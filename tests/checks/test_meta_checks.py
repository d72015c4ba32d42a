from __future__ import annotations

from typing import Any

import pytest

from fsdp_testkit.checks.meta import NOISE, READ_NOISE, check_meta_init
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout

HSDP = Layout(kind="hsdp", replicate=2, shard=2)


def evidence(rank: int, **changes: Any) -> Evidence:
    load = {
        "allocated": 1000,
        "largest": 10,
        "init_calls": 0,
        "init_elements": 0,
        "init_names": [],
        "shard_bytes": 10**6,
        "model_bytes": 2 * 10**6,
        "buffer_bytes": 0,
        "largest_bytes": 10**5,
        "read": 10**6,
        "read_calls": 10_000,
        "checkpoint_bytes": 2 * 10**6,
        "stray": 0,
        "memory": {"peak": 10**6},
        "environment": {"changed": [], "left": [], "values": {}, "switches": {}},
    } | changes
    return Evidence(rank=rank, facts={"load": load, "parameters": {"w": {"meta": False}}, "buffers": {}})


def findings(**changes: Any) -> list[str]:
    found = check_meta_init([evidence(rank, **changes if rank == 2 else {}) for rank in range(4)], HSDP).findings
    assert {finding.rank for finding in found} <= {2, None}
    return [finding.message for finding in found]


def test_a_lean_load_is_right() -> None:
    assert findings() == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_calls": 2, "init_names": ["normal_", "normal_"]}, "2 init calls on 0 real elements"),
        ({"allocated": 4 * 10**6}, "allocated 4,000,000 bytes"),
        ({"memory": {"peak": NOISE + 4 * 10**6}}, "memory of this rank's process grew by"),
        ({"stray": 2 * 10**5}, "200,000 bytes of tensors outlive the load"),
        ({"read": 3 * 10**6}, "the ranks of replica 1 read 4,000,000 bytes of weight files that hold 2,000,000"),
        ({"read_calls": READ_NOISE + 3 * 10**6}, "the ranks of replica 1 read"),
        (
            {"environment": {"changed": ["A"], "left": ["A"], "values": {}, "switches": {}}},
            "leaves environment variables changed: A",
        ),
        (
            {"environment": {"changed": [], "left": [], "values": {"A": ["0", None]}, "switches": {"A": "1"}}},
            "switch A=1 was not set",
        ),
    ],
)
def test_each_excess_is_a_finding(changes: dict[str, Any], text: str) -> None:
    (message,) = findings(**changes)
    assert text in message


def test_what_stays_on_meta_is_a_finding() -> None:
    item = evidence(0)
    item.facts["buffers"]["b"] = {"meta": True}
    (finding,) = check_meta_init([item], Layout(kind="fsdp", shard=1)).findings
    assert "buffers left on the meta device: ['b']" in finding.message
