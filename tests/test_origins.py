"""docs/origins.md names only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fsdp_testkit.engine.catalogue_of_tests import TESTS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "origins.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
OF_MODELS = sorted(
    {name for group in re.findall(r"\btests? ((?:`\w+`(?:, )?)+)", PAGE) for name in group.split("`")[1::2]}
)


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 15
    assert len(OF_MODELS) > 5


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_named_test_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", OF_MODELS)
def test_named_test_of_models_exists(name: str) -> None:
    assert name in TESTS
