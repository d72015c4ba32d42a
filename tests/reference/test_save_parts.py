"""What ranks write by themselves, without any: parts of rows make the file that one process writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import save
from transformers import HrmTextConfig, HrmTextForCausalLM
from transformers.core_model_loading import Chunk, Concatenate, PermuteForRope, Transpose, WeightConverter

from fsdp_testkit.reference import SaveError, adapter, outfile, outputs, writer
from fsdp_testkit.reference.files import DTYPES
from fsdp_testkit.reference.save import _sources
from fsdp_testkit.reference.sources import Source


def write_in_parts(model: Any, path: Path, ranks: int, block: int) -> dict[str, str]:
    """Write the model's file as so many ranks would; return group -> strategy of what is converted."""
    sources = _sources(model)
    groups = outputs.groups_of(model, {name: source.tensor for name, source in sources.items()})
    (file,) = outputs.pack(groups, 10**9)
    with outfile.OutFile(path) as out:
        for rank in reversed(range(ranks)):
            for group in groups:
                held = {name: rows_of(sources[name], rank, ranks) for name in group.inputs}
                if group.strategy == "full":
                    whole = {name: sources[name].tensor.detach() for name in group.inputs}
                    pieces = group.whole(whole, model) if rank == 0 else ()
                else:
                    pieces = group.part(held, block, model) if any(len(rows) for _, rows in held.values()) else ()
                for piece in pieces:
                    out.put(piece.data, file.frame.starts[piece.key] + piece.offset)
        out.begin(file.frame)
    return {group.name: group.strategy for group in groups if group.transform is not None}


def rows_of(source: Source, rank: int, ranks: int) -> tuple[int, torch.Tensor]:
    chunk = -(-source.height // ranks)
    start, stop = (min(source.height, chunk * place) for place in (rank, rank + 1))
    return start, source.rows(start, stop)


def hrm_text() -> Any:
    common: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48}
    config = HrmTextConfig(**common, num_layers_per_stack=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    torch.manual_seed(0)
    return HrmTextForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "strategies"), [("llama", set()), ("mixtral", {"unstacked"}), ("hrm_text", {"moved"})]
)
def test_parts_make_the_file_of_save_pretrained(tmp_path: Path, name: str, strategies: set[str]) -> None:
    model = hrm_text() if name == "hrm_text" else small.build(name)
    model.save_pretrained(tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for ranks, block in ((1, writer.BLOCK), (2, 1), (3, 500), (5, 10_000)):
        path = tmp_path / f"{ranks}"
        assert set(write_in_parts(model, path, ranks, block).values()) == strategies
        assert path.read_bytes() == expected


@pytest.mark.parametrize(
    ("operations", "sources", "target", "strategy"),
    [
        # as loaded; saving does the reverse
        ([Chunk(dim=0)], ["attn.qkv"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "moved"),
        ([PermuteForRope()], ["self_attn.q_proj"], ["self_attn.q_proj"], "moved"),
        ([Concatenate(dim=1)], ["mlp.down_a.weight", "mlp.down_b.weight"], ["mlp.down_proj.weight"], "rows"),
        ([Transpose(0, 1)], ["mlp.down_proj.weight"], ["mlp.down_proj.weight"], "full"),
    ],
)
def test_every_kind_of_conversion(
    tmp_path: Path, operations: list[Any], sources: list[str], target: list[str], strategy: str
) -> None:
    model = small.build("llama", num_key_value_heads=4)
    model._weight_conversions = [WeightConverter(sources, target, operations)]
    model.save_pretrained(tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for ranks, block in ((1, writer.BLOCK), (3, 200)):
        path = tmp_path / f"{ranks}"
        assert set(write_in_parts(model, path, ranks, block).values()) == {strategy}
        assert path.read_bytes() == expected


def test_files_are_laid_out_as_the_library_does(tmp_path: Path) -> None:
    tensors = {
        f"{size}.{name}": torch.arange(size).to(dtype) if dtype != torch.bool else torch.ones(size, dtype=dtype)
        for name, dtype in DTYPES.items()
        for size in (0, 1, 3)
    }
    tensors["scalar"] = torch.tensor(1.5)
    framed = outfile.frame({k: outfile.Spec(t.dtype, tuple(t.shape)) for k, t in tensors.items()})
    with outfile.OutFile(tmp_path / "file") as out:
        for key, tensor in tensors.items():
            out.put(tensor, framed.starts[key])
        out.begin(framed)
    assert (tmp_path / "file").read_bytes() == save(tensors, metadata={"format": "pt"})
    with pytest.raises(SaveError, match=r"has dtype torch\.complex128, which"):
        outfile.frame({"a": outfile.Spec(torch.complex128, (1,))})


def test_files_are_packed_by_group() -> None:
    model = small.build("mixtral")
    groups = outputs.groups_of(model, dict(model.state_dict()))
    for limit in (1, 5_000, 30_000, 10**9):
        files = outputs.pack(groups, limit)
        assert [group for file in files for group in file.groups] == groups
        for file, after in itertools.pairwise(files):
            size = sum(group.nbytes for group in file.groups)
            assert len(file.groups) == 1 or size <= limit
            assert size + after.groups[0].nbytes > limit  # no file is closed too early


def test_the_adapter_knows_what_unstacks_rows() -> None:
    model = small.build("mixtral")
    _, converters = adapter.split_transforms(adapter.reversed_conversions(model))
    assert [adapter.unstacks_rows(converter.operations[-1]) for converter in converters].count(True) == 2
