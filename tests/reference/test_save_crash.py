"""A rank is killed at any step of a save: the old or the new checkpoint is whole, and the next save cleans up."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local_ranks
import pytest
import small
import torch
import torch.distributed as dist
from kill_points import Killer
from torch.distributed.device_mesh import init_device_mesh

from fsdp_testkit.reference import dcp, disk, folders, load_sharded, save_sharded
from fsdp_testkit.reference.files import Checkpoint

LAYOUTS = ("safetensors", "dcp")
#: in the folder that is saved to, or beside it, and none of ours
FOREIGN = (
    "tokenizer.json",
    "notes/a.txt",
    "training.log",
    "../.checkpoint.saving-mine/x",
    "../other/model.safetensors",
)
#: with two ranks, a job for each step takes minutes: all of them with this variable, a sample without
EVERY_STEP = bool(os.environ.get("EVERY_STEP"))


@functools.cache
def version(number: int) -> tuple[Any, Any]:
    """Return a model and its optimizer, which tell which of two versions they are."""
    model = small.build("llama", layers=1, seed=number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 + number, momentum=0.9)
    mark(model, optimizer, number)
    return model, optimizer


def mark(model: Any, optimizer: Any, number: int) -> None:
    """Give the optimizer some state."""
    optimizer.state[model.lm_head.weight]["momentum_buffer"] = torch.full_like(model.lm_head.weight, number)


def found(folder: Path) -> int:
    """Return the number of the version that is in ``folder``; anything but a whole one fails."""
    assert {"config.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
    tensors = {name: torch.empty(t.shape) for name, t in version(0)[0].state_dict().items()}
    if dcp.is_dcp(folder):
        assert not list(folder.glob("*.safetensors*"))
        dcp.read(folder, tensors)
    else:
        saved = Checkpoint(folder)
        assert saved.entries.keys() == tensors.keys()
        assert not saved.problems
        tensors = {name: saved.full(name) for name in tensors}
    (number,) = (n for n in (0, 1) if torch.equal(tensors["lm_head.weight"], version(n)[0].lm_head.weight))
    for name, tensor in version(number)[0].state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    training = json.loads((folder / "training" / "training.json").read_text())
    assert training["groups"][0]["options"]["lr"] == 0.5 + number
    state = torch.empty(tensors["lm_head.weight"].shape)
    dcp.read(folder / "training", {"state.lm_head.weight.momentum_buffer": state})
    assert (state == number).all()
    return number


def save(number: int, folder: Path, layout: str, **options: Any) -> None:
    model, optimizer = version(number)
    save_sharded(model, folder, layout=layout, optimizer=optimizer, max_shard_size="30KB", **options)


def put_foreign(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("tokenizer.json")


def check_foreign(folder: Path) -> None:
    assert {name: (folder / name).read_text() for name in FOREIGN} == {name: name for name in FOREIGN}
    assert (folder / "link").is_symlink()


def check_after(folder: Path) -> int:
    """Check what a killed save left; return the version that is there."""
    if not folder.exists():
        # between two renames, where the system cannot exchange names
        (folder,) = folder.parent.glob(".checkpoint.previous-????????????????")
    check_foreign_inside(folder)
    return found(folder)


def check_foreign_inside(folder: Path) -> None:
    inside = [name for name in FOREIGN if not name.startswith("..")]
    assert [(folder / name).read_text() for name in inside] == inside


def wait(children: list[int]) -> list[int]:
    """Wait for a job's processes and return how they ended; the first that is killed takes the others with it."""
    ends: dict[int, int] = {}
    while len(ends) < len(children):
        for child in children:
            if child not in ends and (done := os.waitpid(child, os.WNOHANG))[0]:
                ends[child] = os.waitstatus_to_exitcode(done[1])
                if ends[child] == -signal.SIGKILL:
                    for other in set(children) - set(ends):
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    return [ends[child] for child in children]


def start(function: Callable[..., int], *arguments: Any) -> int:
    """Run ``function`` in a forked process; it ends with what the function returns."""
    child = os.fork()
    if not child:
        end = 99
        try:
            end = function(*arguments)
        finally:
            os._exit(end)
    return child


def alone(base: Path, number: int, layout: str, at: int) -> int:
    killer = Killer(base, at)
    save(number, base / "checkpoint", layout)
    return 0 if killer.steps >= at > 0 else min(98, killer.steps)


def cannot_exchange(*_: Path) -> bool:
    return False


def kill_everywhere(base: Path, layout: str, exchanges: bool) -> None:
    """Kill a save by one process at each of its steps, until it has fewer."""
    torch.set_num_threads(1)
    folder = base / "checkpoint"
    if not exchanges:
        disk.exchange = cannot_exchange
    save(0, folder, "safetensors", durable=False)
    put_foreign(folder)
    seen, new, killed = set(), 1, 0
    # how the names change matters only near the end; torch writes most of a DCP folder's files in the same way
    step = 3 if layout == "dcp" and not EVERY_STEP else 1
    for at in range(1 if exchanges else 35, 500, step):
        (end,) = wait([start(alone, base, new, layout, at)])
        if end != -signal.SIGKILL:
            assert at - step <= end < at  # it had fewer steps, and ended well
            break
        killed += 1
        seen.add((check_after(folder) == new, len(list(base.glob(".checkpoint.*-????????????????"))) > 0))
        save(new, folder, layout, durable=False)
        assert found(folder) == new
        check_foreign(folder)
        assert {path.name for path in base.iterdir()} == {"checkpoint", "other", ".checkpoint.saving-mine"}
        new = 1 - new
    # before and after, with and without something left behind
    assert seen >= {(False, True), (True, True)}
    assert killed > 10


@pytest.mark.parametrize(("layout", "exchanges"), [("safetensors", True), ("safetensors", False), ("dcp", True)])
def test_killed_at_every_step(tmp_path: Path, layout: str, exchanges: bool) -> None:
    in_process(kill_everywhere, tmp_path / "base", layout, exchanges)


def in_process(function: Any, base: Path, *arguments: Any) -> None:
    """Run in a process without threads, from which forking is safe."""
    multiprocessing.set_forkserver_preload(local_ranks.PRELOAD)
    base.mkdir()
    process = multiprocessing.get_context("forkserver").Process(target=function, args=(base, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0


def one_of_two(base: Path, number: int, layout: str, rank: int, victim: int, at: int) -> int:
    store = dist.FileStore(str(base.parent / f"store-{layout}-{victim}-{at}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = load_sharded(base.parent / f"source{number}", init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 + number, momentum=0.9)
    mark(model, optimizer, number)
    killer = Killer(base, at if rank == victim else -1)
    save_sharded(model, base / "checkpoint", layout=layout, optimizer=optimizer, max_shard_size="30KB")
    return min(98, killer.steps)


def kill_one_of_two(base: Path) -> None:
    torch.set_num_threads(1)
    folder = base / "checkpoint"
    for number in (0, 1):
        version(number)[0].save_pretrained(base.parent / f"source{number}")
    save(0, folder, "safetensors", durable=False)
    put_foreign(folder)
    new, states = 1, set()
    for layout in LAYOUTS:
        for victim, stride in ((0, 19), (1, 11)):
            for at in range(1 if EVERY_STEP else 5, 500, 1 if EVERY_STEP else stride):
                ends = wait([start(one_of_two, base, new, layout, rank, victim, at) for rank in (0, 1)])
                if ends[victim] != -signal.SIGKILL:
                    assert 0 < ends[victim] < at
                    break
                states.add((victim, check_after(folder) == new))
                save(new, folder, layout, durable=False)
                assert found(folder) == new
                check_foreign(folder)
                assert {path.name for path in base.iterdir()} == {"checkpoint", "other", ".checkpoint.saving-mine"}
                new = 1 - new
    assert states >= {(0, False), (0, True), (1, False)}


def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    in_process(kill_one_of_two, tmp_path / "base")


def test_leftovers_of_others(tmp_path: Path) -> None:
    """What dead saves left is removed; what is being written, or is nobody's, stays."""
    folder = tmp_path / "checkpoint"
    dead = [tmp_path / f".checkpoint.{kind}-{number:016x}" for kind in ("saving", "previous") for number in (1, 2)]
    others = [tmp_path / ".checkpoint.saving-0", tmp_path / ".checkpoint2.saving-0000000000000001"]
    for path in [*dead, *others]:
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    with folders.replaced(folder) as partial:
        (partial / "one").touch()
        assert not any(path.exists() for path in dead)
        with folders.replaced(folder, durable=False) as second:
            assert partial.is_dir()
            (second / "two").touch()
    assert {path.name for path in folder.iterdir()} == {"one", "two"}  # neither is part of a checkpoint
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", *(path.name for path in others)}


def test_the_previous_folder_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.previous-0000000000000001").mkdir()
    (tmp_path / ".checkpoint.previous-0000000000000001" / "tokenizer.json").write_text("{}")
    with folders.replaced(tmp_path / "checkpoint") as partial:
        assert (tmp_path / "checkpoint" / "tokenizer.json").exists()
        (partial / "config.json").touch()
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"tokenizer.json", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_links_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "step5").mkdir()
    (tmp_path / "step5").chmod(0o770)
    (tmp_path / "latest").symlink_to("step5")
    with folders.replaced(tmp_path / "latest", durable=False) as partial:
        (partial / "config.json").touch()
        (tmp_path / "step5" / "late.log").touch()
    assert (tmp_path / "latest").is_symlink()
    assert {path.name for path in (tmp_path / "step5").iterdir()} == {"config.json", "late.log"}
    assert (tmp_path / "step5").stat().st_mode & 0o777 == 0o770


def test_what_durable_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, then their folder before it is renamed, then the folder of that; nothing without ``durable``."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for layout in LAYOUTS:
        save(0, tmp_path / layout, layout)
        written = [path for path in (tmp_path / layout).rglob("*") if path.name != ".metadata"]
        assert {path.name for path in written} <= set(synced)
        assert synced[-1] == tmp_path.name
        assert synced[-2].startswith(f".{layout}.saving-")
        synced.clear()
        save(0, tmp_path / layout, layout, durable=False)
        assert set(synced) <= {".metadata.tmp"}  # torch's own
        synced.clear()
