"""Saving models whose weights Accelerate keeps on the CPU or on disk."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from transformers import AutoModelForCausalLM, HrmTextConfig, HrmTextForCausalLM

from fsdp_testkit.reference import SaveError, save_sharded
from fsdp_testkit.reference.files import Checkpoint

accelerate = pytest.importorskip("accelerate")

MODELS = [("llama", True), ("gpt2", False), ("mixtral", True)]


def content(folder: Path) -> dict[str, torch.Tensor]:
    saved = Checkpoint(folder)
    assert not saved.problems
    return {key: saved.full(key).clone() for key in saved.entries}


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = content(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def device_map(model: Any, kind: str) -> dict[str, str]:
    """All on disk, or every second block and the head."""
    if kind == "disk":
        return {"": "disk"}
    parts = [name for name, module in model.named_modules() if name.count(".") == 1 and "layers" not in name[-6:]]
    blocks = [name for name, _ in model.named_modules() if name.count(".") == 2 and name[-1].isdigit()]
    parts = [name for name in parts if name != "transformer.h"]
    return {name: "disk" if name.endswith((".1", "head")) else "cpu" for name in [*parts, *blocks, "lm_head"]}


def offloaded(kind: str, name: str, tie: bool, base: Path) -> Any:
    model = small.build(name, tie=tie)
    if kind == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if kind == "whole":
        return accelerate.disk_offload(model, base / "offload", torch.device("cpu"))
    model.save_pretrained(base / "source")
    return AutoModelForCausalLM.from_pretrained(
        base / "source", device_map=device_map(model, kind), offload_folder=base / "offload"
    )


@pytest.mark.parametrize("kind", ["cpu", "whole", "disk", "mixed"])
@pytest.mark.parametrize(("name", "tie"), MODELS)
def test_offloaded_models_are_saved_as_plain_ones(tmp_path: Path, kind: str, name: str, tie: bool) -> None:
    small.build(name, tie=tie).save_pretrained(tmp_path / "plain")
    expected = content(tmp_path / "plain")
    model = offloaded(kind, name, tie, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    for size in ("5GB", "20KB", 1):
        save_sharded(model, tmp_path / "saved", max_shard_size=size, durable=False)
        assert_same(tmp_path / "saved", expected)
    save_sharded(model, tmp_path / "dcp", layout="dcp", durable=False)
    assert (tmp_path / "dcp" / ".metadata").exists()


@pytest.mark.parametrize(("name", "size"), [("llama", "20KB"), ("mixtral", "5GB")])
def test_a_model_still_runs_after_it_was_saved_over_the_files_it_reads(tmp_path: Path, name: str, size: str) -> None:
    expected = small.build(name)
    model = offloaded("disk", name, False, tmp_path)
    save_sharded(model, tmp_path / "source", max_shard_size=size, durable=False)
    small.build(name).save_pretrained(tmp_path / "plain")
    assert_same(tmp_path / "source", content(tmp_path / "plain"))
    with torch.no_grad():
        batch = small.batch(0)
        assert torch.equal(model(**batch).logits, expected(**batch).logits)
    save_sharded(model, tmp_path / "source", durable=False)
    assert_same(tmp_path / "source", content(tmp_path / "plain"))


def many_to_one(base: Path) -> Any:
    """A model of which two or four weights are saved as one."""
    common: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48}
    config = HrmTextConfig(**common, num_layers_per_stack=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    torch.manual_seed(0)
    model = HrmTextForCausalLM(config)
    model.save_pretrained(base / "plain")
    return accelerate.disk_offload(model, base / "offload", torch.device("cpu"))


def test_what_is_saved_as_one_stays_in_one_file(tmp_path: Path) -> None:
    model = many_to_one(tmp_path)
    expected = content(tmp_path / "plain")
    for size in (1, "6KB", "9KB", "20KB"):
        save_sharded(model, tmp_path / "saved", max_shard_size=size, durable=False)
        assert_same(tmp_path / "saved", expected)


def test_a_meta_tensor_without_a_value_is_no_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = small.build("llama")
    with pytest.raises(SaveError, match="no offloading hook has its value"):
        save_sharded(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_file_of_memory_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors come back from the hooks one group at a time, and go before the next comes."""
    small.build("mixtral").save_pretrained(tmp_path / "plain")
    model = offloaded("whole", "mixtral", False, tmp_path)
    loader = accelerate.utils.offload.OffloadedWeightsLoader
    read = loader.__getitem__
    alive: list[weakref.ref[Any]] = []
    peaks: list[int] = []

    def watched(self: Any, key: str) -> torch.Tensor:
        value: torch.Tensor = read(self, key)
        alive.append(weakref.ref(value.untyped_storage()))
        peaks.append(sum(storage.nbytes() for ref in alive if (storage := ref()) is not None))
        return value

    monkeypatch.setattr(loader, "__getitem__", watched)
    save_sharded(model, tmp_path / "saved", max_shard_size="20KB", durable=False)
    assert_same(tmp_path / "saved", content(tmp_path / "plain"))
    assert len(peaks) == len(list(model.parameters()))
    # the next is read before the name of the last is given away
    largest = sorted(parameter.nbytes for parameter in model.parameters())[-2:]
    assert max(peaks) <= sum(largest)
