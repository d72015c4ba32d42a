"""Checks are pure: they are tested on evidence made by hand, without starting a process."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdp_testkit.checks.compare import chunk_bounds, compare, expected_part
from fsdp_testkit.checks.files import read_checkpoint, read_safetensors
from fsdp_testkit.checks.saving import check_reload, trained_weights
from fsdp_testkit.checks.structure import check_structure, expand_plan, expected_units
from fsdp_testkit.checks.tolerances import tolerance
from fsdp_testkit.checks.training import check_batches, check_replicas, check_routing, same_rates
from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import InternalError
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout

TWO = Layout(kind="fsdp", shard=2)


def data(values: Any, dtype: str = "float32") -> TensorData:
    array = np.asarray(values, dtype=dtype)
    return TensorData(dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    ("size", "parts", "bounds"),
    [
        (5, 2, [(0, 3), (3, 5)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
        (0, 2, [(0, 0), (0, 0)]),
        (6, 3, [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_chunk_rule(size: int, parts: int, bounds: list[tuple[int, int]]) -> None:
    assert [chunk_bounds(size, parts, index) for index in range(parts)] == bounds


def test_expected_part_under_hsdp_repeats_per_replica() -> None:
    full = np.arange(10).reshape(5, 2)
    layout = Layout(kind="hsdp", replicate=2, shard=2)
    parts = [expected_part(full, layout, rank) for rank in range(4)]
    np.testing.assert_array_equal(parts[0], parts[2])
    np.testing.assert_array_equal(parts[1], full[3:])


def test_compare_within_and_beyond() -> None:
    verdict = Verdict.empty()
    expected = np.array([1.0, -2.0, 4.0], dtype=np.float32)
    compare(verdict, data([1.0, -2.0, 4.0000004]), expected, tolerance=1e-6, check="weights")
    assert not verdict.findings
    compare(verdict, data([1.0, -2.0, 4.4]), expected, tolerance=1e-6, check="weights", parameter="w", rank=1)
    (finding,) = verdict.findings
    assert finding.rank == 1
    assert "index [2]" in finding.message
    assert finding.max_rel_error == pytest.approx(0.1, rel=1e-5)
    assert (verdict.checks, verdict.tensors) == (2, 2)


@pytest.mark.parametrize(("factor", "text"), [(2.0, "2 x the expected"), (0.5, "0.5 x the expected")])
def test_a_constant_factor_is_said(factor: float, text: str) -> None:
    verdict = Verdict.empty()
    expected = np.array([1.0, -2.0, 4.0], dtype=np.float32)
    compare(verdict, data(expected * factor), expected, tolerance=1e-6, check="gradients")
    assert text in verdict.findings[0].message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_is_never_within_tolerance(bad: float) -> None:
    verdict = Verdict.empty()
    compare(verdict, data([1.0, bad]), np.array([1.0, 1.0], dtype=np.float32), tolerance=1e9, check="weights")
    assert "NaN or infinity" in verdict.findings[0].message


def test_zero_expected_and_nonzero_actual_is_a_finding() -> None:
    verdict = Verdict.empty()
    compare(verdict, data([0.0, 1e-30]), np.zeros(2, dtype=np.float32), tolerance=1e-3, check="gradients")
    assert verdict.findings


def test_shape_is_compared_first() -> None:
    verdict = Verdict.empty()
    compare(verdict, data([1.0]), np.ones(2, dtype=np.float32), tolerance=1.0, check="weights", parameter="w")
    assert "shape [1] instead of [2]" in verdict.findings[0].message


def test_every_row_of_the_table_has_a_reason() -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        for device in ("cpu", "cuda"):
            assert tolerance(dtype, device).reason
    with pytest.raises(InternalError, match="float8"):
        tolerance("float8", "cpu")


# structure


TREE: dict[str, Any] = {
    "parameters": {
        "embed.weight": {"shape": [5, 2], "dtype": "float32", "requires_grad": True, "aliases": []},
        "layers.0.w": {"shape": [4, 2], "dtype": "float32", "requires_grad": True, "aliases": []},
        "layers.1.w": {"shape": [4, 2], "dtype": "float32", "requires_grad": True, "aliases": []},
        "norm.weight": {"shape": [2], "dtype": "float32", "requires_grad": True, "aliases": []},
        "head.weight": {"shape": [5, 2], "dtype": "float32", "requires_grad": True, "aliases": []},
    },
    "modules": {
        "": "Model",
        "embed": "Embedding",
        "layers": "ModuleList",
        "layers.0": "Layer",
        "layers.1": "Layer",
        "norm": "Norm",
        "head": "Linear",
    },
    "blocks": ["layers.0", "layers.1"],
    "embeddings": ["embed"],
    "heads": ["head"],
    "norms": ["norm"],
}
UNITS = [
    {"parameters": ["embed.weight"], "modules": ["embed"]},
    {"parameters": ["layers.0.w"], "modules": ["layers.0"]},
    {"parameters": ["layers.1.w"], "modules": ["layers.1"]},
    {"parameters": ["head.weight", "norm.weight"], "modules": ["norm", "head"]},
    {"parameters": [], "modules": [""]},
]


def structure(rank: int, **changes: Any) -> Evidence:
    parameters = {}
    for name, facts in TREE["parameters"].items():
        start, stop = chunk_bounds(facts["shape"][0], 2, rank)
        parameters[name] = {
            **facts,
            "meta": False,
            "dtensor": True,
            "placements": ["S0"],
            "mesh": [2],
            "local_shape": [stop - start, *facts["shape"][1:]],
        }
    facts = {
        "parameters": parameters,
        "units": json.loads(json.dumps(UNITS)),
        "plan": "auto",
        "kept": ["norm.weight", "head.weight"],
    }
    return Evidence(rank=rank, facts=facts | changes)


def judge(first: Evidence) -> list[str]:
    verdict = check_structure([first, structure(1)], TREE, TWO)
    assert verdict.checks > 40
    return [finding.message for finding in verdict.findings]


def test_a_right_structure_has_no_findings() -> None:
    assert judge(structure(0)) == []


def test_each_structural_fault_has_its_message() -> None:
    first = structure(0)
    first.facts["units"].pop(1)
    assert any("block layers.0 (Layer) is not an FSDP unit" in text for text in judge(first))
    assert any("layers.0.w belongs to 0 FSDP units" in text for text in judge(first))

    first = structure(0)
    first.facts["units"].pop()
    assert any("root module is not an FSDP unit" in text for text in judge(first))

    first = structure(0)
    first.facts["units"][3:4] = [
        {"parameters": ["norm.weight"], "modules": ["norm"]},
        {"parameters": ["head.weight"], "modules": ["head"]},
    ]
    assert any("are not one FSDP unit" in text for text in judge(first))

    first = structure(0, kept=["layers.0.w", "norm.weight", "head.weight"])
    assert judge(first) == ["after a forward layers.0.w is still gathered"]

    first = structure(0)
    first.facts["parameters"]["embed.weight"]["local_shape"] = [2, 2]
    texts = judge(first)
    assert any("local shape [2, 2] on this rank instead of [3, 2]" in text for text in texts)
    assert any("hold 8 elements over all ranks instead of 10" in text for text in texts)

    first = structure(0)
    first.facts["parameters"]["head.weight"]["placements"] = ["R"]
    assert any("head.weight lies as ['R']" in text for text in judge(first))

    first = structure(0)
    first.facts["parameters"]["head.weight"]["dtensor"] = False
    assert any("is a plain tensor" in text for text in judge(first))

    first = structure(0)
    first.facts["parameters"]["norm.weight"]["meta"] = True
    assert any("still on the meta device" in text for text in judge(first))


def test_a_root_that_holds_just_the_forgotten_block_is_seen() -> None:
    first = structure(0)
    first.facts["units"][1] = {"parameters": [], "modules": []}
    first.facts["units"][-1] = {"parameters": ["layers.0.w"], "modules": [""]}
    assert any("block layers.0 (Layer) is not an FSDP unit" in text for text in judge(first))


def test_ties_lost_and_made_up() -> None:
    tied = json.loads(json.dumps(TREE))
    del tied["parameters"]["head.weight"]
    tied["parameters"]["embed.weight"]["aliases"] = ["head.weight"]
    verdict = check_structure([structure(0)], tied, TWO)
    assert any("no longer one object" in finding.message for finding in verdict.findings)
    first = structure(0)
    first.facts["parameters"]["embed.weight"]["aliases"] = ["norm.weight"]
    assert any("became one object" in text for text in judge(first))


def test_manual_plan_expansion() -> None:
    plan = {"modules": {"layers.*": {"reshard_after_forward": True}, "hed": {}, "embed": {}}}
    rules, unmatched = expand_plan(plan, TREE)
    assert sorted(rules) == ["embed", "layers.0", "layers.1"]
    assert unmatched == ["hed"]
    assert {frozenset(unit) for unit in expected_units(rules, TREE)} == {
        frozenset({"embed.weight"}),
        frozenset({"layers.0.w"}),
        frozenset({"layers.1.w"}),
    }
    verdict = check_structure([structure(0, plan=plan, kept=[])], TREE, TWO)
    assert any("'hed' matches no module" in finding.message for finding in verdict.findings)


# training


def trace(rank: int, digest: str, tokens: int) -> Evidence:
    return Evidence(rank=rank, facts={"batches": {"0": [digest]}, "tokens": {"0": [tokens]}})


def test_equal_batches_and_equal_tokens_are_findings() -> None:
    assert not check_batches([trace(0, "a", 3), trace(1, "b", 4)]).findings
    assert "same batch as rank 0" in check_batches([trace(0, "a", 3), trace(1, "a", 4)]).findings[0].message
    assert "same number of valid tokens" in check_batches([trace(0, "a", 3), trace(1, "b", 3)]).findings[0].message


def test_another_number_of_groups_is_another_learning_rate() -> None:
    assert same_rates([1e-3, 5e-4], [1e-3, 5e-4])
    assert not same_rates([1e-3, 1e-3], [1e-3, 5e-4])
    assert not same_rates([1e-3, 1e-3, 1e-3], [1e-3, 1e-3])
    assert not same_rates([1e-3], [1e-3, 1e-3])  # numpy would repeat it


def test_replicas_are_compared_after_every_step() -> None:
    case = Case(model=ModelSpec(model_type="x"), layout=Layout(kind="hsdp", replicate=2, shard=2))
    ranks = [Evidence(rank=r, facts={"digests": {"0": {"w": str(r % 2)}, "1": {"w": str(r % 2)}}}) for r in range(4)]
    assert not check_replicas(ranks, case).findings
    ranks[3].facts["digests"]["1"]["w"] = "x"
    (finding,) = check_replicas(ranks, case).findings
    assert (finding.rank, finding.step, finding.parameter) == (3, 1, "w")


# saving


def test_trained_weights_are_joined_by_the_chunk_rule() -> None:
    full = np.arange(10, dtype=np.float32).reshape(5, 2)
    ranks = []
    for rank in range(2):
        start, stop = chunk_bounds(5, 2, rank)
        facts = {"w": {"shape": [5, 2], "dtensor": True, "placements": ["S0"]}}
        ranks.append(Evidence(rank=rank, facts={"parameters": facts}, tensors={"final/w": data(full[start:stop])}))
    joined = trained_weights(ranks, TWO)
    np.testing.assert_array_equal(joined["w"].array(), full)
    loaded = Evidence(rank=1, facts={"parameters": ranks[1].facts["parameters"]}, tensors={"weight/w": data(full[3:])})
    assert not check_reload([loaded], joined, TWO, "here").findings
    loaded.tensors["weight/w"] = data(np.full((2, 2), np.nan))
    assert "4 of 4 values are NaN" in check_reload([loaded], joined, TWO, "here").findings[0].message
    loaded.tensors = {"weight/v": data([1.0])}
    assert {finding.parameter for finding in check_reload([loaded], joined, TWO, "here").findings} == {"v", "w"}


def write_file(path: Path, tensors: dict[str, list[float]], *, cut: int = 0) -> None:
    header: dict[str, Any] = {}
    blob = b""
    for name, values in tensors.items():
        raw = np.asarray(values, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + blob
    path.write_bytes(content[: len(content) - cut])


def test_files_are_read_and_judged(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": [1.0, 2.0]})
    write_file(tmp_path / "b.safetensors", {"x": [1.0, 2.0], "y": [3.0]})
    assert read_safetensors(tmp_path / "b.safetensors")["y"].array().tolist() == [3.0]
    tensors, _, verdict = read_checkpoint(tmp_path)
    assert set(tensors) == {"x", "y"}
    texts = [finding.message for finding in verdict.findings]
    assert any("x is stored in 2 files" in text for text in texts)
    assert any("no index" in text for text in texts)
    index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    texts = [finding.message for finding in read_checkpoint(tmp_path)[2].findings]
    assert any("misplaces ['y'] and names keys that no file holds: ['z']" in text for text in texts)


def test_a_truncated_file_is_a_finding(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": [1.0, 2.0]}, cut=4)
    assert any("unreadable" in finding.message for finding in read_checkpoint(tmp_path)[2].findings)
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    assert any("too few" in finding.message for finding in read_checkpoint(tmp_path)[2].findings)


def test_an_expert_that_one_rank_never_reaches_is_a_finding() -> None:
    def truth(*idle: tuple[int, int, list[int]]) -> Evidence:
        items = [{"rank": rank, "step": step, "parameter": "w", "experts": experts} for rank, step, experts in idle]
        return Evidence(rank=0, facts={"losses": {"0": [[1.0], [1.0]], "1": [[1.0], [1.0]]}, "idle_experts": items})

    assert not check_routing(truth()).findings
    assert not check_routing(truth((0, 0, [3]), (1, 1, [3]))).findings, "reached at another step"
    assert not check_routing(truth((0, 0, [3]), (0, 1, [3]), (1, 0, [3]), (1, 1, [3]))).findings, "by nobody: by design"
    (finding,) = check_routing(truth((0, 0, [3]), (0, 1, [3]), (1, 1, [3]))).findings
    assert "('w', 3, 0)" in finding.message
