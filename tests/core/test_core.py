"""Plain data: what goes over process borders comes back the same, and bad values are refused at the door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import EnvironmentLacksError, InternalError, UsageError
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Finding, Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.core.versions import SUPPORTED, check_supported


@pytest.mark.parametrize("text", ["fsdp(2)", "hsdp(2, 2)", "ddp(4)", "single", "fsdp(1)", "hsdp(1, 2)"])
def test_layout_round_trip(text: str) -> None:
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["fsdp", "fsdp(0)", "hsdp(2)", "single(2)", "tp(2)", "fsdp(2", "hsdp(2, 2, 2)", ""])
def test_layout_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="must"):
        Layout.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "tensor"},
        {"kind": "fsdp", "shard": 0},
        {"kind": "fsdp", "shard": True},
        {"kind": "fsdp", "replicate": 2},
        {"kind": "ddp", "shard": 2},
        {"kind": "fsdp", "device": "tpu"},
        {"kind": "fsdp", "comm": "mpi"},
        {"kind": "fsdp", "comm": "nccl"},
    ],
)
def test_layout_names_the_value(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"must|needs"):
        Layout(**fields)  # type: ignore[arg-type]


def test_hsdp_coordinates_are_row_major() -> None:
    layout = Layout(kind="hsdp", replicate=2, shard=3)
    assert [layout.coordinate(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert layout.world_size == 6
    with pytest.raises(UsageError, match=r"rank=6"):
        layout.coordinate(6)


def case() -> Case:
    return Case(
        model=ModelSpec(model_type="llama", tie=True, dropout=0.1),
        layout=Layout(kind="hsdp", replicate=2, shard=2),
        plan='{"mode":"manual","modules":{}}',
        max_norms=(0.0, 0.5),
        steps=3,
        fault="a.b:C",
    ).with_options(test="hsdp_vs_ddp", ranks=[0, 1])


def test_case_round_trip_and_key() -> None:
    again = Case.from_json(case().to_json())
    assert again == case()
    assert again.key == case().key
    assert hash(again) == hash(case())
    assert again.option("ranks") == [0, 1]
    assert again.option("missing", 7) == 7
    assert "seed" not in json.loads(case().to_json()), "defaults are left out, so that a replay command stays short"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "must be the JSON"),
        ("[]", "must be a JSON object"),
        ('{"model": {"model_type": "x"}, "layout": {"kind": "fsdp"}, "colour": 1}', "unknown fields"),
        ('{"model": {"model_type": "x", "size": 1}, "layout": {"kind": "fsdp"}}', "ModelSpec"),
        ('{"model": {"model_type": "x"}, "layout": {"kind": "fsdp"}, "dtype": "int8"}', "dtype"),
        ('{"model": {"model_type": "x"}, "layout": {"kind": "fsdp"}, "normalisers": ["sum"]}', "normalisers"),
        ('{"model": {"model_type": ""}, "layout": {"kind": "fsdp"}}', "model_type"),
    ],
)
def test_case_refuses(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Case.from_json(text)


def test_normalisers_and_bounds_are_cycled() -> None:
    one = case()
    assert [one.normaliser(step) for step in range(3)] == ["rank_mean", "token_mean", "rank_mean"]
    assert [one.max_norm(step) for step in range(3)] == [0.0, 0.5, 0.0]


def test_evidence_round_trip(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    evidence = Evidence(rank=3, facts={"losses": {"0": [1.5]}})
    evidence.tensors["a/b"] = TensorData("float32", (2, 3), values.tobytes())
    evidence.tensors["empty"] = TensorData("int64", (0, 4), b"")
    evidence.tensors["scalar"] = TensorData("float64", (), np.float64(2.5).tobytes())
    evidence.write(tmp_path / "e.bin")
    again = Evidence.read(tmp_path / "e.bin")
    assert (again.rank, again.facts) == (3, evidence.facts)
    np.testing.assert_array_equal(again.tensors["a/b"].array(), values)
    assert again.tensors["empty"].array().shape == (0, 4)
    assert float(again.tensors["scalar"].array()) == 2.5
    assert [name for name, _ in again.under("a/")] == ["b"]


def test_truncated_evidence_is_an_error(tmp_path: Path) -> None:
    evidence = Evidence(rank=0)
    evidence.tensors["a"] = TensorData("float32", (4,), bytes(16))
    evidence.write(tmp_path / "e.bin")
    data = (tmp_path / "e.bin").read_bytes()
    (tmp_path / "e.bin").write_bytes(data[:-4])
    with pytest.raises(InternalError, match="truncated at a"):
        Evidence.read(tmp_path / "e.bin")


def test_bfloat16_is_widened_exactly() -> None:
    tensor = TensorData("bfloat16", (3,), np.array([0x3F80, 0xC000, 0x7FC0], dtype="<u2").tobytes())
    np.testing.assert_array_equal(tensor.array(), np.array([1.0, -2.0, np.nan], dtype=np.float32))


def test_verdict_counts_and_merges() -> None:
    verdict = Verdict.empty()
    assert verdict.expect(True, check="a", message="m")
    assert not verdict.expect(False, check="a", message="m", rank=1)
    other = Verdict(findings=[], checks=3, tensors=2, max_rel_error=0.5)
    verdict.add(other)
    assert (verdict.checks, verdict.tensors, verdict.max_rel_error) == (5, 2, 0.5)
    assert verdict.findings == [Finding(check="a", message="m", rank=1)]
    assert verdict.findings[0].to_dict() == {"check": "a", "message": "m", "rank": 1, "judged_by": "rules"}


def test_versions_outside_the_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_supported()
    monkeypatch.setitem(SUPPORTED, "torch", ((1, 0),))
    with pytest.raises(EnvironmentLacksError, match=r"torch 2\.13.* is outside .* 1\.0\.x"):
        check_supported()
    monkeypatch.setenv("FSDP_TESTKIT_ANY_VERSION", "1")
    check_supported()
    monkeypatch.delenv("FSDP_TESTKIT_ANY_VERSION")
    monkeypatch.setitem(SUPPORTED, "no-such-distribution", ((1, 0),))
    with pytest.raises(EnvironmentLacksError):
        check_supported()
