"""What the meters of a load see: memory, bytes read, environment, allocations inside of DTensor's operators."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_testkit.reference import progress
from fsdp_testkit.scenarios.environment import watching_environment
from fsdp_testkit.scenarios.memory import MemorySampler, stray_bytes
from fsdp_testkit.scenarios.meta import AllocationCounter
from fsdp_testkit.scenarios.reading import counting_reads, find_readers

SIZE = 24 * 2**20


def test_the_sampler_sees_a_passing_peak_outside_of_torch(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with MemorySampler(0.001) as sampler:
        with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for place in range(0, SIZE, mmap.PAGESIZE):
                held[place] = 1
            time.sleep(0.02)
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert not any(mapped[:: mmap.PAGESIZE])
            time.sleep(0.02)
    assert SIZE - 2**20 <= sampler.peak < 1.5 * SIZE  # and not the mapped file
    assert sampler.end < SIZE // 2
    assert max(mapped for _, _, mapped in sampler.points) >= SIZE - 2**20
    line = sampler.timeline(10)
    assert len(line) <= 10
    assert max(held for _, held, _ in line) == sampler.peak // 1024


def test_reads_are_counted_whichever_way(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100, 10), "b": torch.ones(7)}, path)
    with counting_reads() as reads:
        import safetensors

        with safetensors.safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {"a", "b"}
            part = file.get_slice("a")
            assert part.get_shape() == [100, 10]
            assert part[10:20].sum() == 100
            assert file.get_tensor("b").sum() == 7
        with path.open("rb") as raw:
            view = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        torch.frombuffer(view, dtype=torch.uint8, count=50)
        memory = mmap.mmap(-1, 4096)
        torch.frombuffer(memory, dtype=torch.uint8)
        path.read_bytes()
    assert reads.mapped == 400 + 28 + 50
    size = path.stat().st_size
    assert size <= reads.calls < size + 4096
    assert safetensors.safe_open is safe_open
    assert type(mmap.mmap(-1, 1)) is mmap.mmap


def test_changes_of_the_environment_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_A", "1")
    monkeypatch.delenv("KIT_B", raising=False)
    with watching_environment() as changes:
        os.environ["KIT_A"] = "2"
        os.environ["KIT_B"] = "secret"
        os.environ["KIT_A"] = "1"
        os.environ.pop("KIT_B")
        os.environ["KIT_C"] = "left"
    os.environ.pop("KIT_C")
    assert changes.facts(["KIT_A"]) == {
        "changed": ["KIT_A", "KIT_B", "KIT_C"],
        "left": ["KIT_C"],
        "values": {"KIT_A": ["2", "1"]},
    }


def test_allocations_inside_of_dtensor_operators_are_counted() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        tensor = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)], src_data_rank=None)
        with AllocationCounter() as counter:
            made = tensor + 1
        assert made.to_local().shape == (4, 4)
        assert counter.total >= 64
    finally:
        dist.destroy_process_group()


def test_stray_tensors_are_those_beside_the_model() -> None:
    model = torch.nn.Linear(100, 100)
    before = stray_bytes(model)
    kept = torch.ones(1000)
    assert stray_bytes(model) - before == 4000
    del kept
    assert stray_bytes(model) == before


@pytest.mark.parametrize(("shown", "seconds", "seen"), [(True, 2.0, True), (False, 2.0, False), (True, 0.5, False)])
def test_the_bar_is_for_long_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shown: bool, seconds: float, seen: bool
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(2000, shown=shown)
    bar.add(500)
    now[0] += seconds
    bar.add(1000)
    bar.close()
    assert ("loading:" in capsys.readouterr().err) == seen


def test_readers_that_come_and_go_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    before, original = find_readers(), safe_open  # this module's own is replaced too
    assert sys.modules["safetensors"] in before
    late = ModuleType("late_reader")
    vars(late)["safe_open"] = original
    other = ModuleType("other_reader")
    vars(other)["safe_open"] = open
    for module in (late, other, ModuleType("no_reader")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert find_readers() == [*before, late]
    assert find_readers() == [*before, late]
    with counting_reads():
        assert vars(late)["safe_open"] is not original
        assert vars(other)["safe_open"] is open
    assert vars(late)["safe_open"] is original
    del vars(late)["safe_open"]
    assert find_readers() == before
