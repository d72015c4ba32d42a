"""From what a test class says about its model to a `ModelSpec`: plain data that the ranks can rebuild."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models.own_code import has_own_code, read_config


def resolve(test: Any) -> ModelSpec:
    """Return the model that a test instance is about.

    The first of these that is there decides: ``config``, ``model_type``, ``model_tester.get_config()``.

    Raises:
        UsageError: the class says nothing, or something impossible; the message has the attribute and its value.
    """
    owner = type(test).__name__
    model_class = _class_path(owner, "model_class", getattr(test, "model_class", None))
    name = getattr(test, "model_type", None)
    if (config := _config_attribute(test, owner)) is not None:
        if isinstance(config, str | Path):
            if Path(config).is_dir():
                return _from_folder(owner, Path(config), model_class, name)
            config = _read_config(owner, config)
        return _from_config(owner, "config", config, model_class, name)
    if name is not None:
        check_model_type(f"{owner}.model_type", name)
        return ModelSpec(model_type=name, model_class=model_class)
    if (tester := getattr(test, "model_tester", None)) is not None:
        return _from_tester(owner, tester, model_class)
    raise UsageError(
        f"{owner} names no model. Give the class model_type = 'llama' (the kit builds a tiny config), "
        "config = LlamaConfig(...) (an instance, or a function without arguments that returns one), "
        "or a model_tester with get_config()"
    )


def check_model_type(label: str, value: Any) -> None:
    """Refuse a model type that the installed transformers does not know.

    Raises:
        UsageError: the message has near matches.
    """
    from fsdp_testkit.models.catalogue import causal_lm_types, near_matches

    if not isinstance(value, str) or not value:
        raise UsageError(f"{label}={value!r} must be text such as 'llama'")
    if value not in causal_lm_types():
        near = near_matches(value)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise UsageError(
            f"{label}={value!r} must be a causal-LM model type of the installed transformers{hint}. "
            "For a model of your own give config = ... (and model_class = ...)"
        )


def name_of(cls: type) -> str:
    """Return the model type of a test class as far as the class alone tells; else the class's name.

    It names the item before it runs: nothing is called and nothing imported.
    """
    name = getattr(cls, "model_type", None)
    if isinstance(name, str) and name:
        return name
    name = getattr(getattr(cls, "config", None), "model_type", None)
    return name if isinstance(name, str) and name else cls.__name__


def _config_attribute(test: Any, owner: str) -> Any:
    raw = inspect.getattr_static(test, "config", None)
    if raw is None:
        return None
    value = test.config
    if inspect.isclass(value):
        raise UsageError(
            f"{owner}.config={value.__name__} is a class, and its defaults make a model of full size: "
            f"give an instance, config = {value.__name__}(hidden_size=64, ...), "
            "or model_type for the kit's tiny config"
        )
    if callable(value):
        # a plain function in the class body becomes a method: call it as it was written
        takes_self = not inspect.isfunction(raw) or bool(inspect.signature(raw).parameters)
        try:
            value = value() if takes_self else raw()
        except Exception as error:
            raise UsageError(f"{owner}.config() cannot be built: {type(error).__name__}: {error}") from error
    return value


def _from_config(owner: str, name: str, config: Any, model_class: str, model_type: str | None) -> ModelSpec:
    if not hasattr(config, "to_dict") or not hasattr(config, "model_type"):
        raise UsageError(
            f"{owner}.{name}={_short(config)} must be a transformers config such as LlamaConfig(...), "
            "a function without arguments that returns one, or the path of a config.json or of a folder with one"
        )
    model_type = model_type or config.model_type
    if not model_type:
        raise UsageError(
            f"{owner}.{name} is a {type(config).__name__} without a model_type: give the class model_type = 'a name'"
        )
    return ModelSpec(
        model_type=model_type,
        config=_config_json(owner, name, config),
        config_class=_class_path(owner, name, type(config)),
        model_class=model_class,
    )


def _from_folder(owner: str, folder: Path, model_class: str, model_type: str | None) -> ModelSpec:
    """Return the spec of a folder's ``config.json``; classes in the folder are named, and nothing of it is run."""
    values = read_config(f"{owner}.config", folder)
    if not has_own_code(values):
        return _from_config(owner, "config", _read_config(owner, folder / "config.json"), model_class, model_type)
    if model_class:
        raise UsageError(f"{owner}.model_class={model_class!r}: the class is named by auto_map in {folder}/config.json")
    return ModelSpec(
        model_type=model_type or values["model_type"],
        config=json.dumps(values, sort_keys=True, separators=(",", ":")),
        code=str(folder.resolve()),
    )


def _from_tester(owner: str, tester: Any, model_class: str) -> ModelSpec:
    """Return the spec of transformers' model testers, which carry sizes and a ``get_config``."""
    if not callable(getattr(tester, "get_config", None)):
        raise UsageError(f"{owner}.model_tester={_short(tester)} must have a method get_config()")
    with _without_dropout(tester):
        try:
            config = tester.get_config()
        except Exception as error:
            raise UsageError(
                f"{owner}.model_tester.get_config() cannot be built: {type(error).__name__}: {error}"
            ) from error
    if not model_class:
        # testers of encoders and of vision models have the attribute with None
        kind = getattr(tester, "causal_lm_class", None) or getattr(tester, "conditional_generation_class", None)
        model_class = _class_path(owner, "model_tester.causal_lm_class", kind)
    return _from_config(owner, "model_tester.get_config()", config, model_class, None)


@contextmanager
def _without_dropout(tester: Any) -> Iterator[None]:
    """Set the tester's dropouts to 0 while the config is built; derived fields then agree with them."""
    attributes = getattr(tester, "__dict__", {})
    old = {
        name: value
        for name, value in attributes.items()
        if re.search("drop", name) and isinstance(value, int | float) and not isinstance(value, bool)
    }
    attributes.update({name: type(value)(0) for name, value in old.items()})
    try:
        yield
    finally:
        attributes.update(old)


def _config_json(owner: str, name: str, config: Any) -> str:
    """Return the config as JSON: only what differs from its class's defaults, where that rebuilds it exactly."""
    full = config.to_dict()
    chosen = full
    try:
        defaults = type(config)().to_dict()
        absent = object()
        small = {
            name: value
            for name, value in full.items()
            # what the engine adjusts has to be there
            if "drop" in name or isinstance(value, dict) or defaults.get(name, absent) != value
        }
        # a short config makes a replay command that fits on a screen
        if type(config).from_dict(copy.deepcopy(small)).to_dict() == full:
            chosen = small
    except Exception:  # some configs cannot be built from a part of themselves, or without arguments
        chosen = full
    try:
        return json.dumps(chosen, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise UsageError(f"{owner}.{name} cannot be written as JSON, which the ranks need: {error}") from None


def _read_config(owner: str, path: str | Path) -> Any:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{owner}.config={str(path)!r} must be an existing config.json, or a folder with one")
    from transformers import AutoConfig

    try:
        # what is not said is asked for on the terminal
        return AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if has_own_code(read_config(f"{owner}.config", file.parent)):
            reason = f"its classes are code of its folder, so name that: {str(file.parent)!r}"
        raise UsageError(f"{owner}.config={str(path)!r} cannot be built: {reason}") from error


def _class_path(owner: str, name: str, value: Any) -> str:
    """Return ``module:QualName`` of a class that ranks can import; ``""`` for ``None``."""
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        if not re.fullmatch(r"[\w.]+:[\w.]+", value):
            raise UsageError(f"{owner}.{name}={value!r} must be a class, or text like 'package.module:Class'")
        return value
    if not inspect.isclass(value):
        raise UsageError(f"{owner}.{name}={_short(value)} must be a class, or text like 'package.module:Class'")
    path = f"{value.__module__}:{value.__qualname__}"
    found: Any = None
    if value.__module__ != "__main__":
        try:
            found = importlib.import_module(value.__module__)
            for part in value.__qualname__.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
    if found is not value:
        raise UsageError(
            f"{owner}.{name}: {path} cannot be imported by the ranks. "
            "Define the class at the top of a module that can be imported, outside functions and scripts"
        )
    return path


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
