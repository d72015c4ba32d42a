"""``--fsdp-family``: which models it leaves, the markers of families, and errors."""

from __future__ import annotations

import pytest
from plugin_project import Project

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models.catalogue import causal_lm_types
from fsdp_testkit.models.families import FAMILY_NAMES, family_of, of_families


def test_families_divide_the_catalogue() -> None:
    types = causal_lm_types()
    parts = [of_families(types, name) for name in FAMILY_NAMES]
    assert sorted(model for part in parts for model in part) == list(types)
    assert of_families(("llama", "bert", "mixtral"), "moe, decoder") == ("bert", "mixtral")
    assert family_of("somewhere/config.json") == "unlisted"


@pytest.mark.parametrize(
    ("text", "message"),
    [("mooe", "family='mooe' must be one of dense, moe"), ("other", "leaves none of the 1 selected")],
)
def test_bad_families(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of_families(("llama",), text)


def test_option_and_marker(matrix: Project) -> None:
    matrix.run("--fsdp-models", "llama,mixtral,bert", "--fsdp-family", "moe,decoder", "-k", "dcp")
    assert [call.split("/")[0] for call in matrix.tests_run()] == ["mixtral", "bert"]
    result = matrix.run("--fsdp-models", "llama,mixtral", "-m", "moe", "-k", "dcp")
    result.assert_outcomes(passed=1)
    result = matrix.run("--fsdp-models", "llama", "--fsdp-family", "mooe")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--fsdp-family: family='mooe' must be one of dense, moe, hybrid, *"])
