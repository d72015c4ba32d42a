"""Loading on real ranks: who reads for whom, and what all do when one fails."""

from __future__ import annotations

import gc
import itertools
import resource
import shutil
import socket
import time
import weakref
from pathlib import Path
from typing import Any

import local_ranks
import pytest
import small
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from fsdp_testkit.reference import LoadError, adapter, load_sharded, places, save_sharded, stream, weights
from fsdp_testkit.reference.files import Checkpoint
from fsdp_testkit.reference.origin import Origin
from fsdp_testkit.reference.routes import SCOPES, sources
from fsdp_testkit.reference.weights import GroupReader

GRID = [[0, 1], [2, 3]]
NODES = {0: "a", 1: "a", 2: "a", 3: "b"}


@pytest.mark.parametrize(
    ("source", "scope", "expected"),
    [
        ("slices", "replica", [0, 1, 2, 3]),
        ("slices", "node", [0, 1, 0, 3]),
        ("slices", "global", [0, 1, 0, 1]),
        ("rank0", "replica", [0, 0, 2, 2]),
        ("rank0", "node", [0, 0, 0, 3]),
        ("rank0", "global", [0, 0, 0, 0]),
    ],
)
def test_who_reads_for_whom(source: str, scope: str, expected: list[int]) -> None:
    found = sources(GRID, source, scope, NODES)
    assert [found[rank] for rank in range(4)] == expected


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    opened: list[Checkpoint] = []
    original = Checkpoint.__init__

    def noted(self: Checkpoint, folder: Path) -> None:
        original(self, folder)
        opened.append(self)

    monkeypatch.setattr(Checkpoint, "__init__", noted)
    return opened


def every_route(rank: int, base: Path) -> None:
    meshes = {(4,): small.mesh_of((4,)), (2, 2): small.mesh_of((2, 2))}
    with pytest.MonkeyPatch.context() as patch:
        opened = counted(patch)
        patch.setattr(socket, "gethostname", lambda: f"node{NODES[rank]}")
        for name, tie in (("llama", True), ("mixtral", False)):
            whole = small.build(name, tie=tie)
            size = sum(p.nbytes for p in whole.parameters())
            for shape, source, scope in itertools.product(meshes, ("slices", "rank0"), SCOPES):
                opened.clear()
                model = load_sharded(base / name, meshes[shape], source=source, source_scope=scope, dtype=torch.float32)
                small.assert_equal_to(model, whole)
                grid = [[0, 1, 2, 3]] if shape == (4,) else GRID
                table = sources(grid, source, scope, NODES)
                assert bool(opened) == (table[rank] == rank), (shape, source, scope)
                read = torch.tensor([sum(saved.bytes_read for saved in opened)])
                dist.all_reduce(read)
                if scope != "node":
                    replicas = len(grid) if scope == "replica" else 1
                    assert read.item() == replicas * size, (shape, source, scope)


def test_every_source_and_scope(tmp_path: Path) -> None:
    for name, tie in (("llama", True), ("mixtral", False)):
        small.build(name, tie=tie).save_pretrained(tmp_path / name)
    local_ranks.run(every_route, 4, tmp_path)


def dcp_routes(_: int, base: Path) -> None:
    mesh = small.mesh_of((2, 2))
    whole = small.build("gpt2", tie=True)
    save_sharded(load_sharded(base / "gpt2", mesh), base / "dcp", layout="dcp")
    for source, scope in itertools.product(("slices", "rank0"), ("replica", "global")):
        small.assert_equal_to(load_sharded(base / "dcp", mesh, source=source, source_scope=scope), whole)


def test_sources_of_a_dcp_folder(tmp_path: Path) -> None:
    small.build("gpt2", tie=True).save_pretrained(tmp_path / "gpt2")
    local_ranks.run(dcp_routes, 4, tmp_path)


def flattened(rank: int, base: Path) -> None:
    whole = small.build("llama")
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    with pytest.raises(LoadError, match=r"flatten it: mesh\['dp', 'cp'\]"):
        load_sharded(base / "llama", root)
    mesh = root["dp", "cp"]._flatten("dp_cp")
    for source in ("slices", "rank0"):
        model = load_sharded(base / "llama", mesh, source=source)
        small.assert_equal_to(model, whole)
        for name, parameter in model.named_parameters():
            assert parameter.device_mesh.size() == 4, name
            assert parameter.to_local().shape[0] == len(torch.chunk(torch.empty(parameter.shape[0]), 4)[rank]), name
    model.train()(**small.batch(rank)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_flattened_mesh_of_context_parallelism(tmp_path: Path) -> None:
    small.build("llama").save_pretrained(tmp_path / "llama")
    local_ranks.run(flattened, 4, tmp_path)


# --- failures ---


def no_memory(*_: Any) -> None:
    """Stand in for an allocation: ask for more than the process may have."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, before[1]))
    try:
        torch.empty(2**28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def raises(*_: Any, **__: Any) -> None:
    raise KeyError("struck")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def another_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"__metadata__":{"format":"pt"}', b'"__metadata__":{"format":"qt"}'))


# what is done to one rank: (its own copy of the folder is changed so, this is patched, what all say)
FAULTS: dict[str, tuple[Any, Any, str]] = {
    "truncated": (truncate, None, "is truncated"),
    "other header": (another_header, None, "do not see the same checkpoint"),
    "vanished": (lambda folder: (folder / "model.safetensors").unlink(), None, "holds neither"),
    "gone": (shutil.rmtree, None, "holds no config.json|is not a folder"),
    "changed": (None, (Checkpoint, "_map", lambda self, _: truncate(self.folder) or ORIGINAL_MAP(self, 0)), "changed"),
    "no memory": (None, (places.Places, "window", no_memory), "allocate memory"),
    "exception": (None, (GroupReader, "part", raises), "KeyError"),
    "late": (None, (places.Places, "install", raises), "KeyError"),
}
ORIGINAL_MAP = Checkpoint._map


def struck(rank: int, base: Path) -> None:
    mesh = small.mesh_of((3,))
    for (name, (change, patched, text)), source in itertools.product(FAULTS.items(), ("slices", "rank0")):
        for victim in (0, 1):
            if source == "rank0" and (name == "other header" or (victim and name not in ("no memory", "late"))):
                continue  # only the source reads
            folder = base / f"{name}-{source}-{victim}-{rank}"
            shutil.copytree(base / "llama", folder)
            with pytest.MonkeyPatch.context() as patch:
                if rank == victim and change is not None:
                    change(folder)
                if rank == victim and patched is not None:
                    patch.setattr(*patched)
                dist.barrier()
                began = time.monotonic()
                with pytest.raises(LoadError, match=text) as caught:
                    load_sharded(folder, mesh, source=source, dtype=torch.bfloat16)
            assert time.monotonic() - began < 10
            said: list[Any] = [None] * 3
            dist.all_gather_object(said, str(caught.value).replace(str(folder), "").replace(f"-{rank}/", ""))
            if name != "other header":
                assert f"rank {victim}: " in said[0], (name, said)
            assert {text.split(":")[0] for text in said} == {said[0].split(":")[0]}, (name, said)
    small.assert_equal_to(load_sharded(base / "llama", mesh), small.build("llama"))


def test_a_failure_of_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    small.build("llama").save_pretrained(tmp_path / "llama")
    local_ranks.run(struck, 3, tmp_path)


def auto(rank: int, base: Path) -> None:
    mesh = small.mesh_of((2,))
    # a tied parameter that is in the file twice is sent twice and compared
    twice = load_sharded(base / "twice", mesh, source="rank0", dtype=torch.float64)
    small.assert_equal_to(twice, small.build("llama", tie=True).double())
    with pytest.raises(LoadError, match="are tied, but the file holds different values"):
        load_sharded(base / "unequal", mesh, source="rank0")
    folder = base / "llama"
    with pytest.MonkeyPatch.context() as patch:
        opened = counted(patch)
        load_sharded(folder, mesh)
        assert len(opened) == 1
        opened.clear()
        # a folder of rank 0's own: the others are told all they need
        model = load_sharded(folder if rank == 0 else base / "elsewhere", mesh)
        assert len(opened) == (rank == 0)
    small.assert_equal_to(model, small.build("llama"))
    assert model.config.hidden_size == 32
    assert model.generation_config is not None


def struck_in_two_dtypes(rank: int, base: Path) -> None:
    """A unit in bf16 keeps a weight in fp32, so that sharding makes a process group for it."""
    mesh = small.mesh_of((2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
        counts = []
        for _ in range(4):
            model = load_sharded(base / "llama", mesh, dtype=torch.bfloat16)
            layer = model.model.layers[0]
            dtypes = {layer.post_attention_layernorm.weight.dtype, layer.input_layernorm.weight.dtype}
            assert dtypes == {torch.float32, torch.bfloat16}
            del model, layer
            gc.collect()
            counts.append((len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))))
        assert counts[1:] == counts[1:2] * 3, counts  # groups are made once, not with each load
        patch.setattr(adapter, "_twins", {})  # and would be made again
        if rank == 1:
            patch.setattr(Origin, "open", raises)
        began = time.monotonic()
        with pytest.raises(LoadError, match=r"rank 1: KeyError: 'struck'"):
            load_sharded(base / "llama", mesh, dtype=torch.bfloat16)
        assert time.monotonic() - began < 10
        dist.barrier()


def test_nobody_waits_in_a_new_group_for_a_rank_that_failed(tmp_path: Path) -> None:
    small.checkpoint(tmp_path, "llama")
    local_ranks.run(struck_in_two_dtypes, 2, tmp_path)


def leaves_conversions(rank: int, base: Path) -> None:
    mesh = small.mesh_of((2,))
    alive: list[int] = []
    readers: weakref.WeakSet[GroupReader] = weakref.WeakSet()
    made, read = GroupReader.__init__, GroupReader.part

    def noted(self: GroupReader, *arguments: Any) -> None:
        made(self, *arguments)
        readers.add(self)

    def counted_part(self: GroupReader, *arguments: Any) -> torch.Tensor:
        value = read(self, *arguments)
        alive.append(sum(reader._converted is not None for reader in list(readers)))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupReader, "__init__", noted)
        patch.setattr(GroupReader, "part", counted_part)
        patch.setattr(weights, "_strategy", lambda *_: "full")
        patch.setattr(stream, "BATCH", 1)  # a batch is one tensor
        small.assert_equal_to(load_sharded(base / "mixtral", mesh, source="rank0"), small.build("mixtral"))
    assert (max(alive) == 1) if rank == 0 else not alive  # one conversion at a time


def test_a_source_holds_one_conversion_at_a_time(tmp_path: Path) -> None:
    small.checkpoint(tmp_path, "mixtral")
    local_ranks.run(leaves_conversions, 2, tmp_path)


def test_auto_reads_where_the_folder_is(tmp_path: Path) -> None:
    small.build("llama").save_pretrained(tmp_path / "llama")
    for name, change in (("twice", 0.0), ("unequal", 1.0)):
        small.build("llama", tie=True).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    local_ranks.run(auto, 2, tmp_path)


# --- zero copies ---


def zero_copy(rank: int, base: Path) -> None:
    mesh = small.mesh_of((2,))
    folder = base / "llama"
    copied = load_sharded(folder, mesh, zero_copy=False)
    model = load_sharded(folder, mesh)
    assert "model.safetensors" in Path("/proc/self/maps").read_text()  # while the model lives
    for one in (copied, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one.train()(**small.batch(rank)).loss.backward()
        optimizer.step()
    for (name, left), (_, right) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert torch.equal(left.to_local(), right.to_local()), name
    # the file is what it was: steps write to private pages
    fresh = load_sharded(folder, mesh)
    small.assert_equal_to(fresh, small.build("llama"))
    # the folder that the weights are mapped from is replaced: what is mapped stays
    save_sharded(model, folder)
    small.assert_equal_to(fresh, small.build("llama"))
    again = load_sharded(folder, mesh)
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left.to_local(), right.to_local()), name
    # and once more from the map of the file that was just written, with a file renamed over it
    if rank == 0:
        other = base / "other" / "model.safetensors"
        other.replace(folder / "model.safetensors")
    dist.barrier()
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left.to_local(), right.to_local()), name
    small.assert_equal_to(load_sharded(folder, mesh), small.build("llama", seed=1))


def test_zero_copies_are_private_and_outlive_their_file(tmp_path: Path) -> None:
    small.build("llama").save_pretrained(tmp_path / "llama")
    small.build("llama", seed=1).save_pretrained(tmp_path / "other")
    local_ranks.run(zero_copy, 2, tmp_path)
