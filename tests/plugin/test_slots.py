"""The workers of one session share the cores; sessions side by side do not know of each other."""

from __future__ import annotations

import itertools

import pytest
from plugin_project import Project

TESTS = """
import os, time
import pytest
from fsdp_testkit.plugin.slots import session_slots

@pytest.mark.parametrize("number", range(4))
def test_lease(request, number):
    slots = session_slots(request.config)
    if slots is None:
        problem = "none"
    else:
        with slots.lease(1000, 1) as lease:
            problem = lease.problem + " ".join(lease.gpus)
            with open("spans", "a") as file:
                file.write(f"{time.monotonic()} ")
                time.sleep(0.2)
                file.write(f"{time.monotonic()}\\n")
    with open("problems", "a") as file:
        file.write(f"{problem}|{os.getpid()}\\n")
"""


@pytest.mark.parametrize("slots", ["cores", "3"])
def test_workers_lease_from_the_controller(project: Project, slots: str) -> None:
    project.pytester.makepyfile(TESTS)
    project.run("-n", "2", "--fsdp-slots", slots).assert_outcomes(passed=4)
    lines = [line.split("|") for line in (project.path / "problems").read_text().splitlines()]
    assert [problem for problem, _ in lines] == [""] * 4
    assert len({pid for _, pid in lines}) == 2
    spans = sorted([float(text) for text in line.split()] for line in (project.path / "spans").read_text().splitlines())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


def test_gpus_are_shared_where_cores_are_not(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ad")
    project.pytester.makepyfile(TESTS)
    project.run("-n", "2").assert_outcomes(passed=4)
    lines = [line.split("|") for line in (project.path / "problems").read_text().splitlines()]
    assert [name for name, _ in lines] == ["GPU-5ad"] * 4
    spans = sorted([float(text) for text in line.split()] for line in (project.path / "spans").read_text().splitlines())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


def test_a_single_process_needs_no_slots(project: Project) -> None:
    project.pytester.makepyfile(TESTS)
    project.run("--fsdp-slots", "cores").assert_outcomes(passed=4)
    project.run("-n", "1").assert_outcomes(passed=4)
    assert (project.path / "problems").read_text().count("none") == 8


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_is_refused(project: Project, value: str) -> None:
    result = project.run(f"--fsdp-slots={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--fsdp-slots='{value}' must be 'none', 'cores' or a number of at least 1"])
