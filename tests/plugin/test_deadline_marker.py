"""The deadline of a job comes from the closest of marker, attribute, option."""

from __future__ import annotations

import pytest
from plugin_project import Project


def test_the_marker_goes_before_the_attribute(project: Project) -> None:
    project.pytester.makepyfile(
        """
        import pytest
        from fsdp_testkit import FSDPTesterMixin

        @pytest.mark.fsdp_deadline(120)
        class TestOne(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp",)
            fsdp_deadline = 90

        class TestTwo(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp",)
            fsdp_deadline = 90
        """
    )
    project.run("--fsdp-deadline", "30").assert_outcomes(passed=2)
    assert [call[4] for call in project.calls() if call[1] == "made"] == ["120.0", "90"]


@pytest.mark.parametrize("arguments", ["0", "-1", "'x'", "float('inf')", "", "1, 2", "minutes=1"])
def test_a_wrong_marker_is_refused_before_anything_runs(project: Project, arguments: str) -> None:
    project.pytester.makepyfile(
        f"import pytest\n@pytest.mark.fsdp_deadline({arguments})\ndef test_it(): open('ran', 'w')\n"
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*fsdp_testkit: @pytest.mark.fsdp_deadline* must *"])
    assert not (project.path / "ran").exists()
