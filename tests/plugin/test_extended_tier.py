"""The extended tier: which methods a class has, by option, ini key and attribute, under pytest and unittest."""

from __future__ import annotations

import subprocess
import sys

import pytest
from plugin_project import Project

from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.plugin.mixin import ALL_METHODS, METHODS

MINE = "from fsdp_testkit import FSDPTesterMixin\n\nclass TestLlama({bases}):\n    model_type = 'llama'\n    {more}\n"


def test_tiers_hold_each_other() -> None:
    assert METHODS.items() < ALL_METHODS.items()
    assert all(name.startswith("test_kit_") for name in ALL_METHODS)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [((), len(METHODS)), (("--fsdp-tier=extended",), len(ALL_METHODS)), (("--fsdp-tier=core",), len(METHODS))],
)
def test_matrix(matrix: Project, arguments: tuple[str, ...], count: int) -> None:
    result = matrix.run("--fsdp-models", "llama", "--fsdp-report=report.json", *arguments)
    result.assert_outcomes(passed=count)
    wanted = ALL_METHODS if count > len(METHODS) else METHODS
    assert {cell[1:] for cell in matrix.rows()} == set(wanted.values())
    assert matrix.report()["environment"]["options"]["tier"] == ("core" if wanted is METHODS else "extended")


@pytest.mark.parametrize("bases", ["FSDPTesterMixin", "FSDPTesterMixin, __import__('unittest').TestCase"])
@pytest.mark.parametrize(
    ("more", "arguments", "count"),
    [
        ("", ("--fsdp-tier=extended",), len(ALL_METHODS)),
        ("", (), len(METHODS)),
        ("fsdp_tier = 'extended'", (), len(ALL_METHODS)),
        ("fsdp_tier = 'core'", ("--fsdp-tier=extended",), len(METHODS)),
        ("fsdp_tests = ('evaluation', 'dcp')", (), 2),
        ("fsdp_tests = ('evaluation', 'dcp')", ("--fsdp-tier=extended",), 2),
    ],
)
def test_own_class(project: Project, bases: str, more: str, arguments: tuple[str, ...], count: int) -> None:
    project.pytester.makepyfile(test_mine=MINE.format(bases=bases, more=more))
    result = project.run(*arguments, "-q")
    result.assert_outcomes(passed=count)


def test_a_method_of_the_user_stays(project: Project) -> None:
    more = "def test_kit_evaluation(self):\n        assert False, 'mine'"
    project.pytester.makepyfile(test_mine=MINE.format(bases="FSDPTesterMixin", more=more))
    result = project.run("--fsdp-tier=extended")
    result.assert_outcomes(passed=len(ALL_METHODS) - 1, failed=1)
    result.stdout.fnmatch_lines(["*AssertionError: mine"])


def test_ini_key_with_workers(matrix: Project) -> None:
    with (matrix.path / "pyproject.toml").open("a") as file:
        file.write('\nfsdp_tier = "extended"\n')
    result = matrix.run("--fsdp-models", "llama,gpt2", "-n2")
    result.assert_outcomes(passed=2 * len(ALL_METHODS))


def test_plain_unittest_has_the_tier_of_its_class() -> None:
    body = MINE.format(bases="FSDPTesterMixin, unittest.TestCase", more="fsdp_tier = 'extended'")
    names = "print(sorted(n for n in unittest.defaultTestLoader.getTestCaseNames(TestLlama)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import unittest\n{body}\n{names}"], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(sorted(ALL_METHODS))


@pytest.mark.parametrize(
    ("more", "arguments", "message"),
    [
        ("", ("--fsdp-tier=full",), "--fsdp-tier='full' must be one of core, extended"),
        ("fsdp_tier = 'all'", (), "TestLlama.fsdp_tier='all' must be one of core, extended"),
        ("fsdp_tiers = 'core'", (), "*did you mean fsdp_tier?"),
    ],
)
def test_wrong_values(project: Project, more: str, arguments: tuple[str, ...], message: str) -> None:
    project.pytester.makepyfile(test_mine=MINE.format(bases="FSDPTesterMixin", more=more))
    result = project.run(*arguments)
    assert result.ret != 0
    text = result.stdout.str() + result.stderr.str()
    assert message.strip("*") in text


def test_every_test_has_a_procedure() -> None:
    from fsdp_testkit.engine.procedures import PROCEDURES

    assert PROCEDURES.keys() == TESTS.keys()
