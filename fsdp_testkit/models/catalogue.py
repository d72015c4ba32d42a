"""Which model types exist and how a user names them. Imports neither torch nor transformers."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError

#: Dense architectures that every change is tested with.
HEADLINE_DENSE = (
    "gpt2",
    "qwen3",
    "phi",
    "llama",
    "modernbert-decoder",
    "olmo3",
    "phi3",
    "mistral",
    "lfm2",
    "qwen3_5_text",
)
#: Mixture-of-experts architectures that every change is tested with.
HEADLINE_MOE = (
    "gpt_oss",
    "glm_moe_dsa",
    "qwen3_moe",
    "glm4_moe_lite",
    "qwen3_5_moe_text",
    "deepseek_v2",
    "qwen3_next",
    "mixtral",
    "qwen2_moe",
    "phimoe",
)
HEADLINE = HEADLINE_DENSE + HEADLINE_MOE

#: Model types that cannot be tested, with the reason that is printed in their result rows.
IMPOSSIBLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm and torchvision and has no size field to make it small",
    "gemma4_assistant": "a drafter: it takes the keys and values of another model and computes no loss",
    "gemma4_unified_assistant": "a drafter: it takes the keys and values of another model and computes no loss",
}

_MAPPING = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@cache
def causal_lm_classes() -> dict[str, str]:
    """Return model type -> class name of the installed transformers' causal-LM mapping, sorted by type.

    The source file is parsed, not imported: that takes milliseconds where the import takes seconds.

    Raises:
        EnvironmentLacksError: transformers is not installed or its mapping has moved.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise EnvironmentLacksError("transformers is not installed: pip install 'fsdp-testkit'")
    path = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    if not path.is_file():
        raise EnvironmentLacksError(f"{path} does not exist: this release of transformers is not known")
    source = path.read_text(encoding="utf-8")
    # the file is long and parsing all of it costs 50 ms: cut out the one statement first
    found = re.search(rf"^{_MAPPING} = OrderedDict\((.*?)^\)", source, re.DOTALL | re.MULTILINE)
    if found is None:
        raise EnvironmentLacksError(f"{path} has no {_MAPPING}: this release of transformers is not known")
    pairs = ast.literal_eval(f"({found.group(1).strip()})")
    return dict(sorted(pairs))


def causal_lm_types() -> tuple[str, ...]:
    """Return all causal-LM model types of the installed transformers, sorted."""
    return tuple(causal_lm_classes())


def near_matches(name: str) -> list[str]:
    """Return at most five known model types that look like ``name``, best first."""
    known = causal_lm_types()
    by_spelling = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    plain = _letters(name)
    by_part = [item for item in known if plain and plain in _letters(item)]
    return list(dict.fromkeys([*by_spelling, *by_part]))[:5]


def select(text: str) -> tuple[str, ...]:
    """Return the model types named by ``text``, in order and without repetitions.

    Args:
        text: comma-separated model types, ``headline``, ``headline_dense``, ``headline_moe``, ``all``, or
            paths of a ``config.json`` or of a folder with one (returned as they are). A folder in the current one
            that has a model type's name is ``./llama``.

    Raises:
        UsageError: a name is unknown (the message has near matches), a path does not exist, nothing is named.
    """
    groups = {
        "headline": HEADLINE,
        "headline_dense": HEADLINE_DENSE,
        "headline_moe": HEADLINE_MOE,
        "all": causal_lm_types(),
    }
    chosen: list[str] = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        if part in groups:
            chosen.extend(groups[part])
        elif part in groups["all"]:
            chosen.append(part)
        elif part.endswith(".json"):
            if not Path(part).is_file():
                raise UsageError(f"models={part!r} must be an existing config.json")
            chosen.append(part)
        elif Path(part).is_dir():
            chosen.append(part)
        else:
            near = near_matches(part)
            hint = f"; near matches: {', '.join(near)}" if near else ""
            raise UsageError(
                f"models={part!r} must be a causal-LM model type of the installed transformers, "
                f"one of {', '.join(groups)}, or a path to a config.json or to a folder with one{hint}"
            )
    if not chosen:
        raise UsageError(f"models={text!r} selects nothing: name at least one model type")
    return tuple(dict.fromkeys(chosen))


def is_path(name: str) -> bool:
    """Return whether one of the names that `select` returns is a path."""
    return name not in causal_lm_types()


def class_safe(model_type: str) -> str:
    """Return ``model_type`` in CamelCase: ``modernbert-decoder`` -> ``ModernbertDecoder``."""
    parts = [part for part in re.split(r"[^0-9A-Za-z]+", model_type) if part]
    # digits that would touch keep an underscore, so that glm4_5 and glm45 stay different
    text = ""
    for part in parts:
        joint = "_" if text and text[-1].isdigit() and part[0].isdigit() else ""
        text += joint + part[0].upper() + part[1:]
    return text


def attribute(model_type: str) -> str:
    """Return ``model_type`` as a Python identifier: ``modernbert-decoder`` -> ``modernbert_decoder``."""
    name = re.sub(r"\W", "_", model_type)
    return f"_{name}" if name[:1].isdigit() else name


def _letters(name: str) -> str:
    return re.sub(r"[^0-9a-z]", "", name.lower())
