"""Nothing is left behind, whoever dies; harnesses do not disturb each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks import Harness, Job

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRELOAD = ("torch.distributed",)
#: Starts two ranks, one of which holds the GIL in C code, and waits.
WAITING_PARENT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
sys.path[:0] = [{root!r}, {here!r}]
from fsdp_testkit.ranks import Harness, Job
harness = Harness(start_method={method!r}, preload=("torch.distributed",))
job = Job(target="targets:waits", args={{"folder": {folder!r}}}, world_size=2, deadline=60)
try:
    harness.run(job)
except KeyboardInterrupt:
    left = sorted(path.name for path in harness.folder.iterdir())
    assert left == ["server-fork.log"], left
    report = harness.run(Job(target="targets:good", world_size=2, deadline=30))
    assert report.outcome == "passed", report.failure.render()
    print("interrupted, and usable again", flush=True)
    raise
"""


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"  # a zombie waits for its parent, nothing more


def eventually(holds: Callable[[], bool], what: str, limit: float = 20.0) -> None:
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def wait_for_ranks(folder: Path, count: int = 2) -> list[int]:
    def written() -> list[int]:
        return [int(text) for path in folder.glob("pid*") if (text := path.read_text())]

    eventually(lambda: len(written()) == count, "the ranks did not start", 60)
    return written()


def job(name: str = "good", **more: object) -> Job:
    return Job(**{"target": f"targets:{name}", "world_size": 2, "deadline": 30, **more})  # type: ignore[arg-type]


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, fsdp_testkit.ranks; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_close_leaves_no_process_file_thread_or_descriptor(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def footprint() -> tuple[int, int, list[str]]:
        return (
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
            [path.name for path in tmp_path.iterdir()],
        )

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Harness(preload=PRELOAD) as warm:  # imports torch, which keeps descriptors of its own
        warm.run(job())
    before = footprint()
    with Harness(preload=PRELOAD, start_method=method) as harness:
        report = harness.run(job("describe", world_size=1 if method == "spawn" else 2))
        assert report.outcome == "passed", report.failure and report.failure.render()
        server = next(iter(harness._links.values())).process.pid
        pids = [reply.value["pid"] for reply in report.replies]
        assert footprint() != before
    harness.close()  # twice does no harm
    assert all(gone(pid) for pid in [server, *pids])
    assert not Path(f"/proc/{server}").exists(), "the server was not reaped"
    assert footprint() == before


@pytest.mark.parametrize(
    ("method", "number"),
    [("forkserver", signal.SIGKILL), ("forkserver", signal.SIGTERM), ("spawn", signal.SIGKILL)],
)
def test_no_rank_outlives_its_parent(method: str, number: int, tmp_path: Path) -> None:
    folder, temp = tmp_path / "seen", tmp_path / "tmp"
    folder.mkdir()
    temp.mkdir()
    code = WAITING_PARENT.format(root=str(ROOT), here=str(HERE), method=method, folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(temp)}) as parent:
        pids = wait_for_ranks(folder)
        parent.send_signal(number)
        assert parent.wait(20) == -number
    eventually(lambda: all(gone(pid) for pid in pids), "a rank outlived its parent")
    eventually(lambda: not list(temp.iterdir()), "the harness's folder outlived its parent")


def test_ctrl_c_ends_the_ranks_and_reaches_the_caller(tmp_path: Path) -> None:
    code = WAITING_PARENT.format(root=str(ROOT), here=str(HERE), method="forkserver", folder=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        pids = wait_for_ranks(tmp_path)
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert "interrupted, and usable again" in out, err
    assert "KeyboardInterrupt" in err
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_server_fails_the_job_and_not_the_next(number: int, tmp_path: Path) -> None:
    with Harness(preload=PRELOAD, grace=1.0) as harness:
        harness.run(job())
        server = harness._links["fork"].process.pid

        def strike() -> None:
            wait_for_ranks(tmp_path)
            os.kill(server, number)

        striker = threading.Thread(target=strike)
        striker.start()
        begun = time.monotonic()
        report = harness.run(job("waits", args={"folder": str(tmp_path)}, deadline=3), explain_hangs=False)
        assert time.monotonic() - begun < 3 + 5
        striker.join()
        assert report.failure is not None
        if number == signal.SIGKILL:
            assert report.failure.kind == "lost"
            assert "the rank server died, and its ranks with it" in report.failure.summary
        else:
            assert report.failure.kind == "hang"
            assert any("the end of rank 0 was not observed" in note for note in report.notes)
        pids = wait_for_ranks(tmp_path)
        eventually(lambda: all(gone(pid) for pid in pids), "a rank outlived the server")
        assert harness.run(job()).outcome == "passed"


def test_two_harnesses_at_once() -> None:
    with Harness(preload=PRELOAD) as one, Harness(preload=PRELOAD) as two:
        reports = []
        other = threading.Thread(
            target=lambda: reports.extend(two.run(job("raises", args={"rank": 1})) for _ in range(5))
        )
        other.start()
        mine = [one.run(job()) for _ in range(5)]
        other.join()
        assert [report.outcome for report in mine] == ["passed"] * 5
        assert [report.failure and report.failure.first_rank for report in reports] == [1] * 5
        two.close()
        assert one.run(job()).outcome == "passed"


def test_a_given_folder_keeps_what_was_not_discarded(tmp_path: Path) -> None:
    with Harness(tmp_path / "deep", preload=()) as harness:
        kept, dropped = (harness.run(job("plain", comm="none", world_size=1)) for _ in range(2))
        dropped.discard()
    assert (kept.folder / "logs" / "rank0.log").exists()
    assert sorted(path.name for path in harness.folder.iterdir()) == [kept.folder.name]
    with Harness(tmp_path / "empty", preload=()):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]\n"
        "from fsdp_testkit.ranks import Harness, Job\n"
        "with Harness(preload=()) as harness:\n"
        "    report = harness.run(Job(target='targets:plain', comm='none'))\n"
        "print('done', report.outcome, report.replies[0].value['torch'], 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done passed False False\n", done.stderr


def test_a_module_that_cannot_be_preloaded_is_noted() -> None:
    with Harness(preload=("no_such_module",)) as harness:
        report = harness.run(job("plain", comm="none", world_size=1))
    assert report.outcome == "passed"
    assert report.notes == ["preloading no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'"]


def test_threads_in_the_server_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Harness(preload=("threaded",)) as harness:
        report = harness.run(job("plain", comm="none", world_size=1))
    assert report.notes == ["preloaded modules left 2 threads in the rank server; forking may deadlock"]


def test_a_server_that_does_not_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os, sys\nprint('out of luck', flush=True)\nos._exit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Harness(preload=("deadly",)) as harness:
        for _ in range(2):
            with pytest.raises(EnvironmentLacksError, match="out of luck"):
                harness.run(job("plain", comm="none", world_size=1))


def test_the_harness_refuses_bad_arguments() -> None:
    for bad in ({"start_method": "fork"}, {"preload": "torch"}, {"grace": -1.0}, {"grace": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            Harness(**bad)  # type: ignore[arg-type]
    harness = Harness()
    harness.close()
    with pytest.raises(UsageError, match="closed"):
        harness.run(job())
