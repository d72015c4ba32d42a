"""The shared training step, against its definition worked out in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import local_ranks
import pytest
import small
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from fsdp_testkit.backends.base import Backend, MicroBatch, OptimizerConfig
from fsdp_testkit.backends.loop import TrainingLoop, by_layout
from fsdp_testkit.backends.reference import ReferenceBackend
from fsdp_testkit.reference import load_sharded

TOKENS = ((3, 11), (0, 5))  # per rank and micro-batch


def micro_batches(rank: int) -> list[MicroBatch]:
    return [MicroBatch(inputs=small.batch(rank, step), tokens=TOKENS[rank][step]) for step in range(2)]


def defined(normaliser: str, ranks: int) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Return (gradient by name, losses by rank) by the definition, in one process."""
    whole = small.build("llama", tie=True)
    total = sum(sum(tokens) for tokens in TOKENS[:ranks])
    losses: list[list[float]] = []
    for rank in range(ranks):
        losses.append([])
        for step in range(2):
            loss = whole(**small.batch(rank, step)).loss
            losses[-1].append(loss.item())
            (loss * (1 / (2 * ranks) if normaliser == "rank_mean" else TOKENS[rank][step] / total)).backward()
    return {name: p.grad for name, p in whole.named_parameters()}, losses


def observed(model: Any, normaliser: str, rank: int, max_norm: float) -> tuple[dict[str, torch.Tensor], Any]:
    loop = TrainingLoop()
    optimizer = loop.make_optimizer(model, OptimizerConfig())
    seen: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            seen[name.removeprefix("module.")] = grad.clone()

    optimizer.register_step_pre_hook(note)
    output = loop.train_step(model, optimizer, micro_batches(rank), normaliser, max_norm)
    assert all(p.grad is None for p in model.parameters())
    return seen, output


def compare(model: Any, normaliser: str, rank: int, ranks: int, max_norm: float) -> None:
    seen, output = observed(model, normaliser, rank, max_norm)
    gradient, losses = defined(normaliser, ranks)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert output.losses == losses[rank]
    assert output.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    scale = min(1.0, max_norm / norm.item()) if max_norm else 1.0
    assert seen.keys() == gradient.keys()
    for name, grad in seen.items():
        torch.testing.assert_close(grad, gradient[name] * scale, rtol=1e-4, atol=1e-7)


def on_ranks(rank: int, base: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for normaliser in ("rank_mean", "token_mean"):
        for max_norm in (0.0, 0.3, 1e9):
            compare(load_sharded(base / "llama", mesh), normaliser, rank, 2, max_norm)
            compare(DistributedDataParallel(small.build("llama", tie=True)), normaliser, rank, 2, max_norm)


def test_two_ranks(tmp_path: Path) -> None:
    small.build("llama", tie=True).save_pretrained(tmp_path / "llama")
    local_ranks.run(on_ranks, 2, tmp_path)


@pytest.mark.parametrize("normaliser", ["rank_mean", "token_mean"])
def test_without_a_process_group(normaliser: str) -> None:
    compare(small.build("llama", tie=True), normaliser, 0, 1, 0.5)


def test_arguments() -> None:
    model = small.build("llama")
    optimizer = TrainingLoop().make_optimizer(model, OptimizerConfig())
    blocks = len(model.model.layers)
    # outside the blocks, in each block, the last norm and the head: the latter belong to the first
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * (1 + blocks)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert len({tuple(map(tuple, (p.shape for p in g["params"]))) for g in optimizer.param_groups[2:]}) == 2
    with pytest.raises(ValueError, match="normaliser='sum'"):
        TrainingLoop().train_step(model, optimizer, micro_batches(0), "sum", 0.0)
    with pytest.raises(ValueError, match="micro_batches is empty"):
        TrainingLoop().train_step(model, optimizer, [], "rank_mean", 0.0)
    with pytest.raises(ValueError, match="max_norm=-1"):
        TrainingLoop().train_step(model, optimizer, micro_batches(0), "rank_mean", -1)
    empty = [MicroBatch(inputs=small.batch(0), tokens=0)]
    with pytest.raises(ValueError, match="at least one token"):
        TrainingLoop().train_step(model, optimizer, empty, "token_mean", 0.0)


def test_reference_is_a_backend() -> None:
    assert isinstance(ReferenceBackend(), Backend)


def test_tensors_of_equal_meshes_are_one_group(claim: Any) -> None:
    # as where DTensor remembers a result of an earlier load, which made a mesh of its own
    meshes = [claim(0, 2), DeviceMesh("cpu", [0, 1])]
    assert meshes[0] is not meshes[1]
    tensors = [DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False) for mesh in meshes]
    whole = DTensor.from_local(torch.ones(2), meshes[0], [Replicate()], run_check=False)
    groups = by_layout([tensors[0], whole, torch.ones(2), tensors[1]])
    assert [len(group) for group in groups] == [2, 1, 1]
    assert groups[0][1] is tensors[1]
