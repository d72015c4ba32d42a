"""What the engine is told of the tests that are still to come."""

from __future__ import annotations

import pytest
from plugin_project import Project

MODELS = """
import pytest
from fsdp_testkit import FSDPTesterMixin

class TestA(FSDPTesterMixin):
    model_type = "llama"
    fsdp_tests = ("dcp", "resume", "meta_init")

class TestB(FSDPTesterMixin):
    model_type = "gpt2"
    fsdp_tests = ("dcp", "resume")

    @pytest.mark.fsdp_deadline(99)
    def test_kit_dcp(self):
        super().test_kit_dcp()
"""


def expected(project: Project) -> list[tuple[str, str]]:
    return [(call[2], call[3]) for call in project.calls() if call[1] == "expect"]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_the_rest_of_the_class_is_announced(project: Project, workers: tuple[str, ...]) -> None:
    project.pytester.makepyfile(test_models=MODELS)
    project.run(*workers, subprocess=bool(workers)).assert_outcomes(passed=5)
    assert sorted(expected(project)) == sorted(
        [
            ("llama", "dcp/default,resume/default,meta_init/default"),
            ("llama", "resume/default,meta_init/default"),
            ("llama", "meta_init/default"),
            # another deadline shares no work
            ("gpt2", "dcp/default"),
            ("gpt2", "resume/default"),
        ]
    )


def test_what_is_deselected_is_not_announced(project: Project) -> None:
    project.pytester.makepyfile(test_models=MODELS)
    project.run("-k", "TestA and not resume").assert_outcomes(passed=2, deselected=3)
    assert expected(project)[0] == ("llama", "dcp/default,meta_init/default")


def test_nothing_is_announced_where_another_worker_may_get_the_rest(project: Project) -> None:
    project.pytester.makepyfile(test_models=MODELS)
    project.run("-n", "2", "--dist", "load", subprocess=True).assert_outcomes(passed=5)
    assert all("," not in cells for _, cells in expected(project))
