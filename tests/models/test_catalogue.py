from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import catalogue


def test_the_catalogue_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, fsdp_testkit.models.catalogue as c; c.select('all');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_parsing_gives_what_importing_gives_and_is_fast() -> None:
    catalogue.causal_lm_classes.cache_clear()
    start = time.process_time()
    classes = catalogue.causal_lm_classes()
    assert time.process_time() - start < 0.1
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert classes == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert list(classes) == sorted(classes)


def test_the_headline_is_twenty_known_types() -> None:
    assert len(set(catalogue.HEADLINE)) == 20
    assert set(catalogue.HEADLINE) <= set(catalogue.causal_lm_types())
    assert not set(catalogue.HEADLINE) & catalogue.IMPOSSIBLE.keys()


def test_select(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert catalogue.select("llama, mixtral,llama") == ("llama", "mixtral")
    assert catalogue.select("headline") == catalogue.HEADLINE
    assert catalogue.select("headline_moe,llama") == (*catalogue.HEADLINE_MOE, "llama")
    assert catalogue.select("all") == catalogue.causal_lm_types()
    assert catalogue.select(str(config)) == (str(config),)


@pytest.mark.parametrize("text", ["", " , ", "nowhere/config.json", "lama", "gpt-2"])
def test_select_refuses_what_selects_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="models="):
        catalogue.select(text)


def test_unknown_names_come_with_near_matches() -> None:
    with pytest.raises(UsageError, match=r"near matches: .*llama"):
        catalogue.select("lama")
    assert "gpt2" in catalogue.near_matches("gpt-2")
    assert catalogue.near_matches("zzzzzz") == []


def test_names_in_code_are_identifiers_and_differ() -> None:
    types = catalogue.causal_lm_types()
    assert catalogue.class_safe("modernbert-decoder") == "ModernbertDecoder"
    assert len({catalogue.class_safe(name) for name in types}) == len(types)
    assert all(f"Test{catalogue.class_safe(name)}".isidentifier() for name in types)
    assert all(catalogue.attribute(name).isidentifier() for name in types)
