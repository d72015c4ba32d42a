"""A project with a fake engine: what the plugin does is seen without starting a rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CONFTEST = (Path(__file__).parent / "fake_engine.py").read_text(encoding="utf-8")


class Project:
    """A folder with the fake engine in its conftest, and pytest to run there."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        pytester.makeconftest(CONFTEST)
        # the strictest settings that a user may have
        pytester.makepyprojecttoml(
            "[tool.pytest.ini_options]\n"
            'addopts = ["--strict-markers", "--strict-config"]\n'
            'filterwarnings = ["error"]\n'
            "xfail_strict = true\n"
        )

    def outcomes(self, **table: Any) -> None:
        """Say what the fake engine returns: ``model__test="failed"`` or a list of row fields."""
        (self.path / "outcomes.json").write_text(json.dumps(table))

    def run(self, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        """Run pytest; in a process of its own where the project imports heavy packages."""
        run = self.pytester.runpytest_subprocess if subprocess else self.pytester.runpytest_inprocess
        return run("-p", "no:cacheprovider", *arguments)

    def calls(self) -> list[tuple[str, ...]]:
        """Return what the fake engine was asked, over all processes: (pid, what, ...)."""
        log = self.path / "calls.log"
        return [tuple(line.split("|")) for line in log.read_text().splitlines()] if log.exists() else []

    def tests_run(self) -> list[str]:
        """Return ``model/test/variant`` of every call."""
        return ["/".join(call[2:5]) for call in self.calls() if call[1] == "run"]

    def report(self, name: str = "report.json") -> dict[str, Any]:
        """Return the JSON report."""
        document: dict[str, Any] = json.loads((self.path / name).read_text())
        return document

    def rows(self, name: str = "report.json") -> dict[tuple[str, str, str], str]:
        """Return (model, test, variant) -> outcome."""
        results = self.report(name)["results"]
        return {(row["model_type"], row["test"], row["variant"]): row["outcome"] for row in results}


def refused(project: Project, *arguments: str) -> str:
    """Run, expect the refusal, return the message."""
    result = project.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.stderr.lines if line.startswith("ERROR: ")]
    assert line.startswith("ERROR: fsdp_testkit: ")
    assert not project.calls()
    # nothing was collected, and no worker was started
    assert "items" not in result.stdout.str()
    assert "Traceback" not in result.stderr.str()
    return line
