"""The ledger in whole runs."""

from __future__ import annotations

import pytest
from plugin_project import Project

ENTRY = """
[[entry]]
id = "dcp-keys"
cause = "keys are renamed on save"
date = 2025-01-31
fault_of = "transformers"
link = "https://example.org/1"
tests = ["dcp"]
"""


@pytest.fixture
def known(matrix: Project) -> Project:
    (matrix.path / "known.toml").write_text(ENTRY + 'models = ["llama", "gpt2"]\n')
    return matrix


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_known_failures_and_unexpected_passes(known: Project, workers: str) -> None:
    known.outcomes(llama__dcp="failed")
    result = known.run(
        "--fsdp-models=llama,gpt2", "-k", "dcp", "--fsdp-ledger=known.toml", "--fsdp-report=report.json", workers, "-rx"
    )
    result.assert_outcomes(xfailed=1, failed=1)
    assert known.rows() == {("llama", "dcp", "default"): "xfailed", ("gpt2", "dcp", "default"): "xpassed"}
    assert {row["cause"] for row in known.report()["results"]} == {"dcp-keys"}
    result.stdout.fnmatch_lines(
        [
            "gpt2: dcp passed unexpectedly on fsdp(2) with backend reference",
            "  passed, but ledger entry 'dcp-keys' in *known.toml says that it fails.*take 'gpt2' out of models*",
            "x dcp-keys: keys are renamed on save (1: llama)",
            "2 models, 2 rows: 1 xpassed, 1 xfailed",
        ]
    )
    result.stdout.fnmatch_lines(["XFAIL *dcp-keys: keys are renamed on save"])


def test_runxfail_shows_the_failure(known: Project) -> None:
    known.outcomes(llama__dcp="failed")
    result = known.run("--fsdp-models=llama", "-k", "dcp", "--fsdp-ledger=known.toml", "--runxfail")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  1. gradients: the gradient differs from truth's"])


def test_known_failures_in_a_testcase(known: Project) -> None:
    known.pytester.makepyfile(
        test_case="""
        import unittest
        from fsdp_testkit import FSDPTesterMixin

        class TestLlama(FSDPTesterMixin, unittest.TestCase):
            model_type = "llama"
            fsdp_tests = ("dcp",)
        """
    )
    known.outcomes(llama__dcp="failed")
    known.run("test_case.py", "--fsdp-ledger=known.toml").assert_outcomes(xfailed=1)


def test_stale_entries_fail_the_run(known: Project) -> None:
    (known.path / "known.toml").write_text(ENTRY + 'layouts = ["hsdp(9, 9)"]\n')
    result = known.run("--fsdp-models=llama", "-k", "dcp", "--fsdp-ledger=known.toml")
    assert result.ret == 1
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["ERROR fsdp_testkit: ledger entry 'dcp-keys' in *known.toml is stale: its layouts*"])
    # not selected, not judged
    assert known.run("--fsdp-models=llama", "-k", "resume", "--fsdp-ledger=known.toml").ret == 0
