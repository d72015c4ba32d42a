from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed.checkpoint as dist_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, XLNetConfig, XLNetLMHeadModel

from fsdp_testkit.reference import LoadError, dcp, load, load_sharded
from fsdp_testkit.reference.dcp import single_process
from fsdp_testkit.reference.files import Checkpoint


def chunk(tensor: torch.Tensor, size: int, index: int) -> torch.Tensor:
    parts = torch.chunk(tensor, size)
    return parts[index] if index < len(parts) else tensor[:0]


def assert_is_slice_of(model: Any, whole: Any, size: int, index: int) -> None:
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter.to_local(), chunk(expected[name], size, index)), name
        assert parameter.dtype == expected[name].dtype, name
        assert parameter.requires_grad == expected[name].requires_grad, name
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name
    assert not model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("tie", [False, True])
def test_each_rank_holds_its_slice(tmp_path: Path, claim: Any, name: str, tie: bool) -> None:
    folder = small.checkpoint(tmp_path, name, tie=tie)
    whole = small.build(name, tie=tie)
    for shape in ((1,), (2,), (3,), (2, 2), (1, 2), (2, 1), (128,)):
        size = shape[-1]
        for rank in sorted({0, size // 2, size * (shape[0] if len(shape) == 2 else 1) - 1}):
            mesh = claim(rank, *shape, names=("replicate", "shard")[-len(shape) :] if rank else None)
            model = load_sharded(folder, mesh)
            assert_is_slice_of(model, whole, size, rank % size)
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            assert (head.weight is embedding.weight) == tie


def test_a_rank_reads_only_its_slices(tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Checkpoint] = []
    original = Checkpoint.__init__

    def noted(self: Checkpoint, folder: Path) -> None:
        original(self, folder)
        read.append(self)

    monkeypatch.setattr(Checkpoint, "__init__", noted)
    for folder in (small.checkpoint(tmp_path, "llama"), small.checkpoint(tmp_path, "mixtral")):
        for rank in range(3):
            model = load_sharded(folder, claim(rank, 3))
            held = sum(p.to_local().nbytes for p in model.parameters())
            assert read[-1].bytes_read == held, (folder.name, rank)


def test_no_init_function_runs_on_memory(tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.checkpoint(tmp_path, "mixtral")
    from transformers import initialization

    touched: list[str] = []
    for name, function in list(initialization.TORCH_INIT_FUNCTIONS.items()):

        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            tensor = args[0] if args else kwargs["tensor"]
            touched.extend([] if tensor.is_meta else [_name])
            return _function(*args, **kwargs)

        monkeypatch.setitem(initialization.TORCH_INIT_FUNCTIONS, name, counted)
        monkeypatch.setattr(nn.init, name, counted)
    small.build("llama")
    assert touched  # the counter works
    touched.clear()
    load_sharded(folder, claim(0, 2))
    assert touched == []


def test_memory_that_a_constructor_takes_is_given_back(
    tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=small.VOCABULARY)
    whole = XLNetLMHeadModel(config).eval()
    with torch.device("meta"):
        assert not all(p.is_meta for p in XLNetLMHeadModel(config).parameters()), "it calls torch.FloatTensor"
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.02)
    whole.save_pretrained(tmp_path)
    cut: list[bool] = []

    def applied(units: Any, model: Any, mesh: Any) -> None:
        cut.extend(parameter.is_meta for parameter in model.parameters())
        apply(units, model, mesh)

    apply = load.units.apply
    monkeypatch.setattr(load.units, "apply", applied)
    assert_is_slice_of(load_sharded(tmp_path, claim(1, 2)), whole, 2, 1)
    assert cut
    assert all(cut)


def test_fused_checkpoint_and_sharded_checkpoint(tmp_path: Path, claim: Any) -> None:
    whole = small.build("mixtral")
    whole.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    whole.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    for folder in ("fused", "many"):
        assert_is_slice_of(load_sharded(tmp_path / folder, claim(1, 2)), whole, 2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_what_from_pretrained_gives(tmp_path: Path, claim: Any, dtype: torch.dtype) -> None:
    folder = small.checkpoint(tmp_path, "llama")
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model = load_sharded(folder, claim(0, 2), dtype=dtype, model_class=LlamaForCausalLM)
    assert_is_slice_of(model, whole, 2, 0)
    assert model.config.dtype == dtype


def test_kept_in_fp32(tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    folder = small.checkpoint(tmp_path, "llama")
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = load_sharded(folder, claim(1, 2), dtype=torch.bfloat16)
    assert_is_slice_of(model, whole, 2, 1)
    assert model.model.layers[0].post_attention_layernorm.weight.dtype == torch.float32
    assert type(model.model.layers[0].post_attention_layernorm).__name__.startswith("FSDP")


def test_key_of_another_time_is_ignored_where_the_model_says_so(tmp_path: Path, claim: Any) -> None:
    folder = edited(tmp_path, "gpt2", lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1)})
    assert_is_slice_of(load_sharded(folder, claim(0, 2)), small.build("gpt2"), 2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_reads_only_its_rows_of_a_dcp_folder(tmp_path: Path, claim: Any, dtype: torch.dtype) -> None:
    whole = small.build("llama", vocab_size=150_001)
    whole.config.architectures = ["LlamaForCausalLM"]
    whole.config.save_pretrained(tmp_path)
    with single_process():  # one process, so that each tensor is one chunk
        dist_checkpoint.save(whole.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    for rank in (0, 1, 3):
        mesh = claim(rank, 4)
        before = bytes_read()
        model = load_sharded(tmp_path, mesh, dtype=dtype)
        assert bytes_read() - before < 0.35 * size
        for name, parameter in model.named_parameters():
            expected = chunk(whole.get_parameter(name), 4, rank).to(dtype)
            assert torch.equal(parameter.to_local(), expected), name


@pytest.mark.parametrize("small_chunk", [0, dcp.SMALL])
def test_a_dcp_chunk_that_lies_otherwise_is_read_whole(
    tmp_path: Path, claim: Any, monkeypatch: pytest.MonkeyPatch, small_chunk: int
) -> None:
    monkeypatch.setattr(dcp, "SMALL", small_chunk)
    whole = small.build("llama")
    whole.config.architectures = ["LlamaForCausalLM"]
    whole.config.save_pretrained(tmp_path)
    state = whole.state_dict()
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    assert not turned["lm_head.weight"].is_contiguous()
    with single_process():
        dist_checkpoint.save(turned, checkpoint_id=tmp_path, no_dist=True)
    assert_is_slice_of(load_sharded(tmp_path, claim(1, 3)), whole, 3, 1)


def bytes_read() -> int:
    """Bytes that this process has asked files for."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def test_a_dcp_folder_may_hold_what_the_model_ignores(tmp_path: Path, claim: Any) -> None:
    whole = small.build("gpt2")
    whole.config.architectures = ["GPT2LMHeadModel"]
    whole.config.save_pretrained(tmp_path / "dcp")
    extra = {"transformer.h.0.attn.bias": torch.ones(1)}  # the model says that keys of this name are of another time
    with single_process():
        dist_checkpoint.save(whole.state_dict() | extra, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_is_slice_of(load_sharded(tmp_path / "dcp", claim(0, 2)), whole, 2, 0)


def test_base_model_prefix_is_added(tmp_path: Path, claim: Any) -> None:
    folder = edited(tmp_path, "gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}, tie=True)
    assert_is_slice_of(load_sharded(folder, claim(0, 2)), small.build("gpt2", tie=True), 2, 0)


def test_several_ties_and_persistent_buffers(tmp_path: Path, claim: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = BertLMHeadModel(BertConfig(vocab_size=31, is_decoder=True, **sizes)).eval()
    whole.save_pretrained(tmp_path / "bert")
    model = load_sharded(tmp_path / "bert", claim(1, 2))
    assert_is_slice_of(model, whole, 2, 1)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def edited(tmp_path: Path, name: str, change: Any, **options: Any) -> Path:
    folder = small.checkpoint(tmp_path, name, **options)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_all_that_does_not_fit_is_one_error(tmp_path: Path, claim: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(100, 32)
        tensors["model.extra"] = torch.zeros(1)
        tensors["model.layers.0.mlp.experts.0.w1.weight"] = torch.zeros(47, 32)
        tensors["norm.weight"] = torch.zeros(32)
        del tensors["model.layers.1.mlp.experts.2.w2.weight"]
        return tensors

    folder = edited(
        tmp_path, "mixtral", lambda t: change({k.replace("block_sparse_moe", "mlp"): v for k, v in t.items()})
    )
    with pytest.raises(LoadError) as caught:
        load_sharded(folder, claim(0, 2))
    text = str(caught.value)
    assert "mismatched shape of 'lm_head.weight': (100, 32) in the file, (101, 32) in the model" in text
    assert "unexpected key 'model.extra'" in text
    assert "cannot be converted to 'model.layers.0.mlp.experts.gate_up_proj'" in text
    assert "mismatched shape of 'model.layers.1.mlp.experts.down_proj': (2, 32, 48)" in text
    assert len(caught.value.problems) == 5


def test_missing_and_doubled_keys(tmp_path: Path, claim: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"]
        tensors["layers.0.input_layernorm.weight"] = torch.zeros(32)
        return tensors

    with pytest.raises(LoadError) as caught:
        load_sharded(edited(tmp_path, "llama", change), claim(0, 2))
    assert any("missing key 'model.norm.weight' (32,)" in problem for problem in caught.value.problems)
    assert any("doubled key 'model.layers.0.input_layernorm.weight'" in p for p in caught.value.problems)


def test_both_names_of_a_tie_have_to_agree(tmp_path: Path, claim: Any) -> None:
    def double(change: float) -> Any:
        return lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + change}

    model = load_sharded(edited(tmp_path, "llama", double(0.0), tie=True), claim(0, 2))
    assert_is_slice_of(model, small.build("llama", tie=True), 2, 0)
    with pytest.raises(LoadError, match="are tied, but the file holds different values"):
        load_sharded(edited(tmp_path, "llama", double(1.0), tie=True), claim(0, 2))


def break_file(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "no header":
        path.write_bytes(b"\xff" * 100)
    elif how == "garbage header":
        path.write_bytes((8).to_bytes(8, "little") + b"{{{{{{{{" + data[-16:])
    elif how == "short":
        path.write_bytes(b"\x01")
    elif how == "offsets":
        path.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
    elif how == "shape":
        path.write_bytes(data.replace(b'"shape":[101,32]', b'"shape":[-10,32]', 1))
    elif how == "dtype":
        path.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    elif how == "no weights":
        path.unlink()
    elif how == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "no class":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Nothing"]}))
    else:
        target = {"outside": "../model.safetensors", "absolute": str(path), "gone": "other.safetensors"}[how]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
        path.rename(folder.parent / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("truncated", "truncated or too long"),
        ("no header", "truncated or no safetensors file"),
        ("garbage header", "no readable safetensors header"),
        ("short", "no readable safetensors header"),
        ("offsets", "no readable safetensors header|gap or overlap"),
        ("shape", "non-negative"),
        ("dtype", "X32"),
        ("no weights", "holds neither model.safetensors nor"),
        ("pickle", "pytorch_model.bin would have to be unpickled"),
        ("no config", r"holds no config\.json"),
        ("bad config", r"config\.json cannot be read"),
        ("no class", "no known model class"),
        ("outside", "points outside of its folder"),
        ("absolute", "points outside of its folder"),
        ("gone", "names other.safetensors, which does not exist"),
    ],
)
def test_damaged_folders(tmp_path: Path, claim: Any, how: str, text: str) -> None:
    folder = small.checkpoint(tmp_path, "llama")
    break_file(folder, how)
    with pytest.raises(LoadError, match=text):
        load_sharded(folder, claim(0, 2))


def test_index_promises_what_a_file_does_not_hold(tmp_path: Path, claim: Any) -> None:
    folder = tmp_path / "many"
    small.build("llama").save_pretrained(folder, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"missing key 'model\.ghost': the index promises it"):
        load_sharded(folder, claim(0, 2))


def test_arguments(tmp_path: Path, claim: Any) -> None:
    folder = small.checkpoint(tmp_path, "llama")
    mesh = claim(0, 2)
    with pytest.raises(LoadError, match="is not a folder"):
        load_sharded(tmp_path / "nowhere", mesh)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="is an empty folder"):
        load_sharded(tmp_path / "empty", mesh)
    with pytest.raises(LoadError, match=r"dtype=.*must be a floating point"):
        load_sharded(folder, mesh, dtype=torch.int8)
    with pytest.raises(LoadError, match="source='disk'"):
        load_sharded(folder, mesh, source="disk")
    with pytest.raises(LoadError, match="mesh=None"):
        load_sharded(folder, None)
    with pytest.raises(LoadError, match="device='cuda'"):
        load_sharded(folder, mesh, device="cuda")


def test_import_is_light() -> None:
    code = (
        "import sys, fsdp_testkit.reference as r; assert 'torch' not in sys.modules; r.load_sharded, r.save_training;"
        "assert 'torch' in sys.modules; bad = {'pytest', 'fsdp_testkit.core'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "doubled key 'a'"),
        ("[" * 100_000, "is not an index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "points outside of its folder"),
        ('{"weight_map": {"a": ".."}}', "points outside of its folder"),
    ],
)
def test_hostile_indices(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadError, match=message):
        Checkpoint(tmp_path)


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    folder = small.checkpoint(tmp_path, "llama")
    saved = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoadError, match="has changed since its header was read"):
        saved.full("lm_head.weight")
    path.unlink()
    with pytest.raises(LoadError, match="cannot be read"):
        saved.full("lm_head.weight")
