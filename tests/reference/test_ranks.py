"""What only real ranks show: collectives, saving, training, resuming."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import local_ranks
import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fsdp_testkit.backends.base import MicroBatch, OptimizerConfig
from fsdp_testkit.backends.reference import ReferenceBackend
from fsdp_testkit.reference import (
    LoadError,
    SaveError,
    TrainingStateError,
    load_sharded,
    load_training,
    save_sharded,
    save_training,
)

MODELS = [(name, tie) for name in ("llama", "gpt2", "mixtral") for tie in (False, True)]


def folder_of(base: Path, name: str, tie: bool) -> Path:
    return base / f"{name}-tie{tie}"


# --- loading, and saving in both layouts ---


def save_and_reload(rank: int, base: Path, shape: tuple[int, ...]) -> None:
    mesh = small.mesh_of(shape)
    for name, tie in MODELS:
        source = folder_of(base, name, tie)
        model = load_sharded(source, mesh)
        whole = small.build(name, tie=tie)
        small.assert_equal_to(model, whole)
        model(**small.batch(rank)).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        for layout in ("safetensors", "dcp"):
            target = base / f"{source.name}-{layout}"
            save_sharded(model, target, layout=layout)
            small.assert_equal_to(load_sharded(target, mesh), whole)
        save_sharded(model, base / f"{source.name}-many", max_shard_size="20KB")
        small.assert_equal_to(load_sharded(base / f"{source.name}-many", mesh), whole)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_save_is_what_save_pretrained_writes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for name, tie in MODELS:
        small.build(name, tie=tie).save_pretrained(folder_of(tmp_path, name, tie))
    local_ranks.run(save_and_reload, int(np.prod(shape)), tmp_path, shape)
    for name, tie in MODELS:
        source = folder_of(tmp_path, name, tie)
        saved = tmp_path / f"{source.name}-safetensors"
        # the same keys, dtypes, values, order and metadata
        assert (saved / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        for file in ("config.json", "generation_config.json"):
            assert json.loads((saved / file).read_text()) == json.loads((source / file).read_text())
        expected = load_file(source / "model.safetensors")
        many = tmp_path / f"{source.name}-many"
        index = json.loads((many / "model.safetensors.index.json").read_text())
        found = {file: load_file(many / file) for file in set(index["weight_map"].values())}
        assert {key: file for file in found for key in found[file]} == index["weight_map"]
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        for key, file in index["weight_map"].items():
            assert torch.equal(found[file][key], expected[key])
        plain = AutoModelForCausalLM.from_pretrained(many)
        assert all(
            torch.equal(a, b) for a, b in zip(plain.parameters(), small.build(name, tie=tie).parameters(), strict=True)
        )
        assert not list(tmp_path.glob(".*"))


def reload_elsewhere(_: int, base: Path, shape: tuple[int, ...]) -> None:
    for name, tie in MODELS:
        model = load_sharded(folder_of(base, name, tie).with_name(f"{name}-tie{tie}-dcp"), small.mesh_of(shape))
        small.assert_equal_to(model, small.build(name, tie=tie))
    half = load_sharded(base / "llama-tieFalse-dcp", small.mesh_of(shape), dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight.full_tensor(), small.build("llama").lm_head.weight.bfloat16())


def only_save_dcp(_: int, base: Path) -> None:
    for name, tie in MODELS:
        model = load_sharded(folder_of(base, name, tie), small.mesh_of((2,)))
        save_sharded(model, base / f"{name}-tie{tie}-dcp", layout="dcp")


def test_dcp_is_read_on_any_mesh(tmp_path: Path) -> None:
    for name, tie in MODELS:
        small.build(name, tie=tie).save_pretrained(folder_of(tmp_path, name, tie))
    local_ranks.run(only_save_dcp, 2, tmp_path)
    for shape in ((1,), (3,), (2, 2)):
        local_ranks.run(reload_elsewhere, int(np.prod(shape)), tmp_path, shape)


# --- training and resuming ---


class Training:
    """A model with several parameter groups, a frozen parameter and one that no gradient reaches."""

    def __init__(self, source: Path, mesh: Any, *, only_bias: bool = False) -> None:
        self.backend = ReferenceBackend()
        self.model = load_sharded(source, mesh).train()
        self.model.transformer.h[1].ln_2.weight.requires_grad_(False)
        self.optimizer = self.backend.make_optimizer(self.model, OptimizerConfig())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.only_bias = only_bias

    def step(self, rank: int, step: int) -> list[float]:
        # the first steps leave the positions without a gradient, so that they have no optimizer state
        positions = self.model.transformer.wpe.weight
        positions.requires_grad_(step >= 3)
        batches = [MicroBatch(inputs=small.batch(rank, 10 * step + i), tokens=7 * (rank + 1)) for i in range(2)]
        normaliser = "token_mean" if step % 2 else "rank_mean"
        output = self.backend.train_step(self.model, self.optimizer, batches, normaliser, 0.5 * (step % 3))
        self.scheduler.step()
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return [*output.losses, output.grad_norm, *draws, *(group["lr"] for group in self.optimizer.param_groups)]

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: p.full_tensor().detach().clone() for name, p in self.model.named_parameters()}


def seed(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def train_and_save(rank: int, base: Path, shape: tuple[int, ...]) -> None:
    mesh = small.mesh_of(shape)
    seed(rank)
    straight = Training(base / "start", mesh)
    for step in range(2):
        straight.step(rank, step)
    save_sharded(straight.model, base / "half", layout="safetensors")
    save_training(straight.model, straight.optimizer, straight.scheduler, base / "half")
    wanted = [straight.step(rank, step) for step in range(2, 5)]
    torch.save(straight.snapshot(), base / f"end{rank}.pt")

    seed(99)
    resumed = Training(base / "half", mesh)
    load_training(resumed.model, resumed.optimizer, resumed.scheduler, base / "half")
    names = {id(p): n for n, p in resumed.model.named_parameters()}
    with_state = {names[id(p)] for p in resumed.optimizer.state}
    assert "transformer.wpe.weight" not in with_state
    assert "transformer.h.1.ln_2.weight" not in with_state
    assert "transformer.h.1.ln_2.bias" in with_state
    assert [resumed.step(rank, step) for step in range(2, 5)] == wanted
    for name, tensor in resumed.snapshot().items():
        assert torch.equal(tensor, straight.snapshot()[name]), name
    errors_of_training(base, straight, resumed)


def errors_of_training(base: Path, straight: Training, other: Training) -> None:
    model, optimizer, scheduler = other.model, other.optimizer, other.scheduler
    before = [group["lr"] for group in optimizer.param_groups]
    for given, text in (
        ((model, optimizer, None), "scheduler: LambdaLR was saved, None is given"),
        ((model, torch.optim.SGD(model.parameters()), scheduler), "optimizer: AdamW was saved, SGD is given"),
        (
            (model, torch.optim.AdamW(model.parameters()), scheduler),
            f"{len(before)} parameter groups were saved, 1 are given",
        ),
        ((straight.model, optimizer, scheduler), "is not the model's"),
    ):
        with pytest.raises(TrainingStateError, match=text):
            load_training(*given, base / "half")
    with pytest.raises(TrainingStateError, match="missing or damaged"):
        load_training(model, optimizer, scheduler, base / "start")
    damaged_on_rank_1(base, model, optimizer, scheduler)
    with pytest.raises(TrainingStateError, match=r"is not the model's"):
        save_training(straight.model, optimizer, scheduler, base / "foreign")
    scheduler.strange = object()
    with pytest.raises(TrainingStateError, match="not a plain value"):
        save_training(model, optimizer, scheduler, base / "foreign")
    assert [group["lr"] for group in optimizer.param_groups] == before


def damaged_on_rank_1(base: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """What rank 1 finds is not what was saved: both raise, and nothing is changed on either."""
    state, rng = "training.json", "rng-00001.json"
    random.seed(5)
    kept = {p: dict(entry) for p, entry in optimizer.state.items()}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.125
    scheduler.last_epoch, before = 77, random.getstate()
    for name, change, text in (
        (rng, lambda _: {}, r"rng-00001.json is damaged: it lacks 'cuda'"),
        (
            rng,
            lambda content: content | {"torch": "00"},
            r"rng-00001.json is damaged: Expected a CPUGeneratorImplState",
        ),
        (rng, lambda content: content | {"python": [3, 1]}, r"rng-00001.json is damaged: .*unpack"),
        (state, lambda content: {k: v for k, v in content.items() if k != "world"}, "it lacks 'world'"),
        (state, lambda content: content | {"groups": [{}]}, "training.json is damaged: it lacks 'params'"),
        (state, lambda content: content | {"scheduler": {"a": 1}}, "training.json is damaged: .* is not a saved value"),
        (state, lambda content: content | {"scheduler": 3}, "cannot be restored: .*Error"),
    ):
        folder = base / f"damaged{dist.get_rank()}"
        shutil.copytree(base / "half", folder)
        if dist.get_rank() == 1:
            file = folder / "training" / name
            file.write_text(json.dumps(change(json.loads(file.read_text()))))
        with pytest.raises(TrainingStateError, match=text):
            load_training(model, optimizer, scheduler, folder)
        shutil.rmtree(folder)
        assert {p: dict(entry) for p, entry in optimizer.state.items()}.keys() == kept.keys()
        assert all(optimizer.state[p][key] is value for p, entry in kept.items() for key, value in entry.items())
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.125}
        assert (scheduler.last_epoch, random.getstate()) == (77, before), text


def resume_elsewhere(rank: int, base: Path, shape: tuple[int, ...]) -> None:
    resumed = Training(base / "half", small.mesh_of(shape))
    with pytest.raises(TrainingStateError, match="saved on 2 ranks"):
        load_training(resumed.model, resumed.optimizer, resumed.scheduler, base / "half", rng="require")
    load_training(resumed.model, resumed.optimizer, resumed.scheduler, base / "half")
    # the state is the same on any mesh: compare by saving it again
    state = {n: resumed.optimizer.state.get(p) for n, p in resumed.model.named_parameters()}
    full = {
        f"{name}.{key}": value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, entry in state.items()
        if entry
        for key, value in entry.items()
    }
    if rank == 0:
        path = base / "state.pt"
        if path.exists():
            first = torch.load(path)
            assert first.keys() == full.keys()
            assert all(torch.equal(first[key], full[key]) for key in full)
            assert any(bool(value.any()) for key, value in full.items() if key.endswith("exp_avg"))
        torch.save(full, path)


def test_resume_is_exact(tmp_path: Path) -> None:
    small.build("gpt2", attn_pdrop=0.1, resid_pdrop=0.1).save_pretrained(tmp_path / "start")
    local_ranks.run(train_and_save, 2, tmp_path, (2,))
    for shape in ((1,), (2, 2)):
        local_ranks.run(resume_elsewhere, int(np.prod(shape)), tmp_path, shape)


# --- manual plans, and failures of saving ---


def plans_and_failures(rank: int, base: Path) -> None:
    mesh = small.mesh_of((2,))
    reference = load_sharded(base / "llama", mesh)
    loss = reference(**small.batch(rank)).loss
    plan = {
        "mode": "manual",
        "modules": {
            "model.layers.*": {"mixed_precision": "bfloat16", "reshard_after_forward": True},
            "model.embed_tokens": {"cpu_offload": True},
        },
    }
    model = load_sharded(base / "llama", mesh, plan)
    mixed = model(**small.batch(rank)).loss
    mixed.backward()
    assert abs(mixed.item() - loss.item()) < 0.02
    assert model.model.layers[0].mlp.gate_proj.weight.grad.dtype == torch.float32
    small.assert_equal_to(model, small.build("llama"))

    # unsharding works right away, without a forward
    fresh = load_sharded(base / "llama", mesh)
    fresh.model.layers[0].unshard()
    assert torch.equal(
        fresh.model.layers[0].mlp.up_proj.weight, small.build("llama").model.layers[0].mlp.up_proj.weight
    )
    fresh.model.layers[0].reshard()

    (base / "file").write_text("x") if rank == 0 else None
    dist.barrier()
    with pytest.raises(SaveError, match="is a file"):
        save_sharded(fresh, base / "file")
    with pytest.raises(SaveError, match="max_shard_size='big'"):
        save_sharded(fresh, base / "out", max_shard_size="big")
    with pytest.raises(SaveError, match="layout='bin'"):
        save_sharded(fresh, base / "out", layout="bin")

    # a failure on one rank leaves the old folder whole, and all ranks hear of it
    save_sharded(fresh, base / "out")
    if rank == 0:
        (base / "out" / "tokenizer.json").write_text("{}")
        before = sorted(p.name for p in (base / "out").iterdir())
        fresh.generation_config.save_pretrained = failing
    dist.barrier()
    with pytest.raises(SaveError, match="rank 0: "):
        save_sharded(fresh, base / "out", layout="dcp")
    dist.barrier()
    if rank == 0:
        assert sorted(p.name for p in (base / "out").iterdir()) == before
    good = load_sharded(base / "out", mesh)
    save_sharded(good, base / "out", layout="dcp")
    names = {p.name for p in (base / "out").iterdir()}
    assert "tokenizer.json" in names
    assert ".metadata" in names
    assert "model.safetensors" not in names
    dist.barrier()
    damaged_dcp(rank, base, mesh)


def failing(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


def damaged_dcp(rank: int, base: Path, mesh: Any) -> None:
    folder = base / f"damaged{rank}"
    shutil.copytree(base / "out", folder)
    for part in folder.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(LoadError, match="cannot be read as a DCP checkpoint"):
        load_sharded(folder, mesh)
    part.unlink()
    with pytest.raises(LoadError, match="which is not in its folder"):
        load_sharded(folder, mesh)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(LoadError, match="has no place in checkpoint metadata"):
        load_sharded(folder, mesh)


def test_manual_plans_and_failed_saves(tmp_path: Path) -> None:
    small.build("llama").save_pretrained(tmp_path / "llama")
    local_ranks.run(plans_and_failures, 2, tmp_path)
