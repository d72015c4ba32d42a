"""Tiny configs, built by rule from a config class's own fields and defaults."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import adapter, rules
from fsdp_testkit.models.catalogue import IMPOSSIBLE
from fsdp_testkit.models.overrides import OVERRIDES
from fsdp_testkit.models.rules import KEEP, Fields, Value

#: Integers up to this need no rule: they are counts of small things, not widths.
HARMLESS = 8
MISSING = object()


def tiny_config(model_type: str, *, tie: bool | None = None, dropout: float = 0.0) -> Any:
    """Return a config of ``model_type`` whose model has fewer than a million parameters.

    Args:
        model_type: a type of the causal-LM mapping.
        tie: value of ``tie_word_embeddings`` here and in the text sub-config; ``None`` keeps the default.
        dropout: probability for every dropout field.

    Raises:
        UsageError: the type is unknown, or has a size that no rule covers; the message says what to add.
    """
    if model_type in IMPOSSIBLE:
        raise UsageError(f"model_type={model_type!r} cannot be tested: {IMPOSSIBLE[model_type]}")
    override = OVERRIDES.get(model_type)
    # a copy: some config classes change the dicts that they are given
    values = copy.deepcopy(override.values) if override else {}
    kind = adapter.config_class(model_type)
    return _build(kind, {}, values, tie=tie, dropout=dropout)


def _build(kind: Any, initial: dict[str, Any], override: dict[str, Any], *, tie: bool | None, dropout: float) -> Any:
    """Return ``kind(**kwargs)`` by rule; ``initial`` replaces defaults, ``override`` replaces results."""
    defaults = field_defaults(kind) | initial
    fields = Fields(defaults)
    specs = adapter.sub_config_specs(kind)
    kwargs: dict[str, Any] = {}
    # what is not a field (rope_theta of older styles, sizes kept in extra keys) goes through unchanged
    kwargs.update({name: value for name, value in initial.items() if name not in specs})
    for name, default in defaults.items():
        if name in specs or name in override:
            continue
        value = decide(kind.__name__, name, default, fields, dropout)
        if value is not KEEP:
            kwargs[name] = value
    kwargs.update(layer_lists(kind, initial, override, defaults))
    for name, (sub_kind, sub_initial, _) in specs.items():
        part = override.get(name, {})
        if part is None or isinstance(part, dict):
            # tying counts in the outermost config; some models read the text part's own flag
            sub_tie = tie if "text" in name or name == "decoder" else None
            kwargs[name] = None if part is None else _build(sub_kind, sub_initial, part, tie=sub_tie, dropout=dropout)
    kwargs.update({name: value for name, value in override.items() if name not in specs})
    if tie is not None and "tie_word_embeddings" in defaults:
        try:
            return kind(**kwargs | {"tie_word_embeddings": tie})
        except Exception as error:
            # a class that refuses the flag is as one that ignores it: what the model does is measured
            if "tie_word_embeddings" not in str(error):
                raise
    return kind(**kwargs)


def field_defaults(kind: Any) -> dict[str, Any]:
    """Return field name -> default of a config class; fields without a default are left out."""
    result = {}
    for item in dataclasses.fields(kind):
        if item.default is not dataclasses.MISSING:
            result[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            result[item.name] = item.default_factory()
    return result


def decide(owner: str, name: str, default: Any, fields: Fields, dropout: float) -> Any:
    """Return the tiny value of one field, or `KEEP`.

    Raises:
        UsageError: the field is an integer that looks like a size and no rule covers it.
    """
    if isinstance(default, bool):
        return _flag(name, fields)
    if default is None:
        return _match(rules.NONE_RULES, name, fields)
    if "jitter" in name and default is not None:
        return type(default)(0)
    if re.search("drop", name) and isinstance(default, (int, float)):
        # whole layers that vanish would leave parameters without gradients, at random
        return type(default)(0) if "layerdrop" in name else dropout
    if re.fullmatch(r"\w*(token|start|end)_(id|index)|\w*_token_ids?|\w*token_index", name):
        return token_id(name, default)
    if isinstance(default, int):
        value = _match(rules.SIZE_RULES, name, fields, missing=MISSING)
        if value is not MISSING:
            return value
        if default > HARMLESS:
            raise UsageError(
                f"{owner}.{name}={default} is a size that no rule covers: add a row to SIZE_RULES in "
                f"fsdp_testkit/models/rules.py, or the field to the model's entry in models/overrides.py"
            )
    return KEEP


def _match(table: tuple[tuple[str, Value], ...], name: str, fields: Fields, missing: Any = KEEP) -> Any:
    for pattern, value in table:
        if re.fullmatch(pattern, name):
            return value(fields) if callable(value) else value
    return missing


def _flag(name: str, fields: Fields) -> Any:
    """Return the value of a boolean field: what makes a BERT a decoder, and a model slide; else `KEEP`."""
    if name == "is_decoder" and fields.has("add_cross_attention"):
        return True
    if name == "use_cache":
        return False  # a training step needs no cache, and a config holds for every way of calling the model
    if name == "use_sliding_window" and fields.has("sliding_window"):
        return True
    return KEEP


def token_id(name: str, default: Any) -> Any:
    """Return a special token id below the vocabulary size; lists keep their length."""
    if default is None:
        return KEEP
    if isinstance(default, (list, tuple)):
        return [rules.SPECIAL_IDS.get(name, 3)] * len(default)
    for pattern, value in rules.PLACEHOLDERS:
        if re.fullmatch(pattern, name):
            return value
    return rules.SPECIAL_IDS.get(name, 3 if default >= rules.FIRST_WORD else KEEP)


def layer_lists(
    kind: Any, initial: dict[str, Any], override: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the depth and the per-layer lists (attention kind, ...), cut to one layer of each kind.

    A per-layer list is any list as long as the default config is deep. The first layer of every distinct
    combination over all such lists stays. Nothing is returned where the class has no such field.
    """
    given = {name: value for name, value in override.items() if name in defaults and not isinstance(value, dict)}
    if "num_hidden_layers" in given or "num_hidden_layers" not in defaults:
        return {}
    default = default_config(kind, initial | given) or default_config(kind, initial)
    if default is None:
        raise UsageError(
            f"{kind.__name__} refuses its own defaults, so its kinds of layers cannot be read: add num_hidden_layers "
            f"and its per-layer lists to an entry in fsdp_testkit/models/overrides.py"
        )
    depth = default.num_hidden_layers
    lists = {
        name: list(value)
        for name in defaults
        if isinstance(value := getattr(default, name, None), (list, tuple)) and len(value) == depth > 1
    }
    if rules.can_slide(default, lists):
        return {"layer_types": list(rules.SLIDING), "num_hidden_layers": 2, "sliding_window": rules.WINDOW}
    # lists of layer numbers, and counts of leading dense layers, say the same as a flag for each layer
    numbers = {name: value for name in defaults if (value := _layer_numbers(default, name)) is not None}
    lists = {name: value for name, value in lists.items() if name not in numbers}
    flags = {name: [layer in value for layer in range(depth)] for name, value in numbers.items()}
    leading = {name: max(1, getattr(default, name) or 0) for name in defaults if name in rules.LEADING_DENSE}
    flags.update({name: [layer < count for layer in range(depth)] for name, count in leading.items()})
    kinds = lists | flags
    seen: dict[str, int] = {}
    for layer in range(depth):
        seen.setdefault(repr([kinds[name][layer] for name in sorted(kinds)]), layer)
    chosen = sorted(seen.values())
    if len(chosen) < 2:
        chosen = list(range(min(2, depth)))
    result: dict[str, Any] = {name: [value[index] for index in chosen] for name, value in lists.items()}
    result.update({name: [new for new, old in enumerate(chosen) if flags[name][old]] for name in numbers})
    result.update({name: sum(flags[name][index] for index in chosen) for name in leading})
    return result | {"num_hidden_layers": len(chosen)}


def _layer_numbers(config: Any, name: str) -> list[int] | None:
    """Return the value of a field that lists layers by number, ``None`` for other fields."""
    if not re.fullmatch(rules.LAYER_NUMBERS, name):
        return None
    value = getattr(config, name, None)
    # flags for each layer can have the same kind of name; they repeat themselves
    if isinstance(value, (list, tuple)) and list(value) == sorted(set(value)):
        return list(value)
    return None


def default_config(kind: Any, values: dict[str, Any]) -> Any:
    """Return ``kind(**values)``, or ``None`` where the class refuses its own defaults."""
    try:
        return kind(**values)
    except Exception:  # some classes have no valid default; their overrides give what is needed
        return None
