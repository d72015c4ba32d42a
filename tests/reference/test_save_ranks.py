"""Saving on real ranks: what needs communication and what does not, odd placements, failures of one rank."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import local_ranks
import pytest
import small
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dist_checkpoint
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers.core_model_loading import Transpose, WeightConverter

from fsdp_testkit.reference import SaveError, outfile, save_sharded

RANKS = 3


def model(kind: str) -> Any:
    made = small.build("mixtral" if kind == "experts" else "llama")
    if kind == "transposed":
        made._weight_conversions = [WeightConverter(["down_proj.weight"], ["down_proj.weight"], [Transpose(0, 1)])]
    return made


def sharded(kind: str) -> Any:
    made = model(kind)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (RANKS,))}
    if kind == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % RANKS == 0 else None
    if kind == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "ignored":
        options["ignored_params"] = set(made.model.norm.parameters())
    if kind != "replicated":
        fully_shard(made, **options)
    return made


#: kind -> whether tensors travel
KINDS = {
    "rows": False,
    "experts": False,
    "offloaded": False,
    "ignored": False,
    "replicated": False,
    "columns": True,
    "transposed": True,
}


def save_all(rank: int, base: Path) -> None:
    sent: list[int] = []
    send = dist.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        sent.append(len(operations))
        return send(operations)

    dist.batch_isend_irecv = counted
    for kind, travels in KINDS.items():
        made = sharded(kind)
        if kind == "replicated" and rank:
            with torch.no_grad():
                made.model.norm.weight.zero_()  # rank 0's is what counts
        sent.clear()
        for size in ("5GB", "10KB"):
            save_sharded(made, base / f"{kind}-{size}", max_shard_size=size, durable=False)
        assert bool(sent) == (kind == "transposed")
        assert travels or not sent
    plain_tensors_are_rank_0s(rank, base)
    for phase in ("own", "whole"):
        fails_on_one_rank(rank, base, phase)
    for layout in ("safetensors", "dcp"):
        no_plan_on_one_rank(rank, base, layout)


def plain_tensors_are_rank_0s(rank: int, base: Path) -> None:
    made = model("rows")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(rank)
    save_sharded(made, base / "plain-dcp", layout="dcp", durable=False)
    found = {name: torch.full_like(value, -1) for name, value in made.state_dict().items()}
    dist_checkpoint.load(found, checkpoint_id=base / "plain-dcp")
    assert found
    assert not any(value.any() for value in found.values())


def fails_on_one_rank(rank: int, base: Path, phase: str) -> None:
    """The disk of one rank is full: in its own rows, or in what it collected."""
    made = sharded("transposed")
    put = outfile.OutFile.put

    def full(self: Any, tensor: torch.Tensor, offset: int) -> None:
        # only a whole matrix, converted, has so many rows
        whole = tensor.ndim == 2 and tuple(tensor.shape) == (48, 32)
        if rank == 1 and whole == (phase == "whole"):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, tensor, offset)

    outfile.OutFile.put = full  # type: ignore[method-assign]
    before = sorted(path.name for path in base.iterdir())
    dist.barrier()
    with pytest.raises(SaveError, match=r"rank 1: OSError: .*No space left on device"):
        save_sharded(made, base / "rows-5GB")
    outfile.OutFile.put = put  # type: ignore[method-assign]
    assert sorted(path.name for path in base.iterdir()) == before
    dist.barrier()


def no_plan_on_one_rank(rank: int, base: Path, layout: str) -> None:
    """The model of one rank has no value for a buffer."""
    made = sharded("rows")
    made.register_buffer("strange", torch.zeros(1, device="meta" if rank == 2 else "cpu"))
    with pytest.raises(SaveError, match="'strange' is on meta, and no offloading hook has its value"):
        save_sharded(made, base / "rows-5GB", layout=layout, optimizer=torch.optim.SGD(made.parameters()))
    dist.barrier()


def test_any_sharding_makes_the_same_files(tmp_path: Path) -> None:
    local_ranks.run(save_all, RANKS, tmp_path)
    for kind in KINDS:
        model(kind).save_pretrained(tmp_path / f"{kind}-whole")
        expected = (tmp_path / f"{kind}-whole" / "model.safetensors").read_bytes()
        assert (tmp_path / f"{kind}-5GB" / "model.safetensors").read_bytes() == expected, kind
        wanted = load_file(tmp_path / f"{kind}-whole" / "model.safetensors")
        files = sorted((tmp_path / f"{kind}-10KB").glob("*.safetensors"))
        assert len(files) > 3
        found = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
