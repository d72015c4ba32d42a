"""From a `ModelSpec` to a model: in memory with the case's weights, or on the meta device."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import adapter, remote_code, rules
from fsdp_testkit.models.adapted import adapted
from fsdp_testkit.models.catalogue import causal_lm_types
from fsdp_testkit.models.tiny import tiny_config

#: Standard deviation of the noise on every weight: as large as the usual initialisation, so that no weight is
#: left at the ones and zeros that hide a lost or unsynchronised parameter.
WEIGHT_NOISE = 0.02
#: The same for persistent buffers and frozen parameters. Small against the spread of a router's scores: a
#: routing bias must be visible when it is lost and must not starve an expert.
BUFFER_NOISE = 0.002
#: The same for the input embedding and for the matrices of routers. What a token is has to dominate what all
#: tokens have in common (biases, averages that attention makes), or a router sends all tokens to the same experts.
ROUTING_NOISE = 0.2
#: Names of parameters that decide on experts.
ROUTERS = re.compile(r"router|\.gate\.|\.wg\.")
#: Names of persistent integer buffers that give each token id its experts: all zero without a checkpoint.
ROUTING_TABLES = re.compile(r"tid2eid$")


def resolve(spec: ModelSpec) -> tuple[Any, Any]:
    """Return a fresh config and the model class of a spec.

    Raises:
        UsageError: the model type, config or class cannot be found, or is code that this process may not run.
    """
    model_class: Any
    if spec.code:
        model_class = remote_code.model_class(spec.code)
        config = _custom_config(spec, model_class.config_class)
    else:
        config = (
            _custom_config(spec, _imported(spec.config_class))
            if spec.config
            else tiny_config(spec.model_type, tie=spec.tie, dropout=spec.dropout)
        )
        model_class = _imported(spec.model_class) if spec.model_class else adapter.causal_lm_class(config)
    if model_class is None:
        raise UsageError(f"model_type={spec.model_type!r} has no causal-LM class: give model_class='module:QualName'")
    if not spec.model_class:
        config = adapter.part_for(config, model_class)
    return config, adapted(model_class) if spec.adapters else model_class


def spec_from_file(path: str | Path, *, tie: bool | None = None, dropout: float = 0.0) -> ModelSpec:
    """Return the spec of a ``config.json`` of a causal LM.

    Raises:
        UsageError: the file is no JSON object with a causal LM's ``model_type``.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"models={str(path)!r} must be a config.json with a model_type: {error!r}") from None
    kind = adapter.config_class(model_type)
    return ModelSpec(
        model_type=model_type,
        tie=tie,
        config=json.dumps(values, sort_keys=True),
        config_class=f"{kind.__module__}:{kind.__qualname__}",
        dropout=dropout,
    )


def build_model(spec: ModelSpec, *, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the in-memory model of a spec, on the CPU, in training mode, deterministic from ``seed``.

    Weights are initialised by the model's own rules in float32 and then get noise, so that no weight is a one
    or a zero by construction; tied weights stay tied. What a plain load overwrites has the value that it gets
    there. The float32 values are what every dtype starts from:

    * Parameters and persistent buffers are converted as ``from_pretrained(dtype=...)`` would convert a
      float32 checkpoint: what the model keeps in float32 stays there, everything else takes ``dtype``. In
      float64 they are the float32 values, widened.
    * Non-persistent buffers (rotary frequencies, scales) are in no checkpoint: they are what the model's own
      constructor computes under that default dtype and, where its initialisation fills them, what that computes
      in float32. Any loader has to arrive at the same.

    Raises:
        UsageError: see `resolve`.
    """
    config, model_class = resolve(spec)
    model = _construct(model_class, config, seed, torch.float32)
    perturb(model, seed)
    with seeded(seed, torch.float32):
        adapter.initialize_over(model)
    if dtype != torch.float32:
        config, model_class = resolve(spec)
        skeleton = _construct(model_class, config, seed, dtype)
        with seeded(seed, torch.float32):
            adapter.initialize_over(skeleton)
        _convert(model, skeleton, dtype)
    prepare_dtype(model, dtype)
    return model.train()


def prepare_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the model's forward able to run in ``dtype``, in place, however the model was loaded.

    The grouped matrix product of experts has no float64 kernel, so float64 models loop over their experts.
    """
    setter = getattr(model, "set_experts_implementation", None)
    if dtype == torch.float64 and setter is not None:
        setter("eager")


def meta_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model of a spec on the meta device, ties in place."""
    config, model_class = resolve(spec)
    with torch.device("meta"):
        return _construct(model_class, config, 0, dtype)


def perturb(model: nn.Module, seed: int) -> None:
    """Add noise to every floating parameter and persistent buffer, and fill routing tables, in place.

    The noise of a tensor depends on ``seed`` and its name only, not on the order of the modules.
    """
    persistent = set(model.state_dict(keep_vars=True))
    embedding = getattr(_embedding(model, "input"), "weight", None)
    tensors = list(model.named_parameters())
    tensors += [(name, item) for name, item in model.named_buffers() if name in persistent]
    for name, item in tensors:
        generator = torch.Generator().manual_seed(number_from(seed, name))
        if item.is_floating_point():
            scale = WEIGHT_NOISE if item.requires_grad else BUFFER_NOISE
            if item is embedding or (item.requires_grad and item.ndim == 2 and ROUTERS.search(name)):
                scale = ROUTING_NOISE
            noise = torch.randn(item.shape, generator=generator, dtype=torch.float32)
            item.data.add_(noise.to(item.dtype), alpha=scale)  # .data: no graph, also where a gradient is wanted
        elif ROUTING_TABLES.search(name):
            # different experts for one token, each expert equally often
            count = getattr(getattr(model, "config", None), "num_local_experts", rules.EXPERTS)
            first = torch.randint(0, count, item.shape[:1], generator=generator)
            item.copy_((first.unsqueeze(1) + torch.arange(item.shape[1])) % count)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return the sorted names of each group of parameters that are one object; untied ones are left out."""
    groups: dict[int, list[str]] = {}
    for name, item in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(item), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def effective_tie(model: nn.Module) -> bool:
    """Return whether the output embedding is the same parameter as an input embedding.

    Other shared parameters (blocks that are used twice) do not count; see `tied_groups` for those.
    """
    head = _embedding(model, "output")
    weight = getattr(head, "weight", None)
    if weight is not None:
        inside = {id(module) for module in head.modules()}
        return any(
            item is weight
            for module in model.modules()
            if id(module) not in inside
            for item in module.parameters(recurse=False)
        )
    return any(any("embed" in name or "wte" in name for name in group) for group in tied_groups(model))


@cache
def default_variant(model_type: str) -> str:
    """Return ``tied`` or ``untied``: what the default of ``tie_word_embeddings`` really does."""
    return "tied" if effective_tie(meta_model(ModelSpec(model_type=model_type))) else "untied"


def warm_modules(model_types: tuple[str, ...] | list[str]) -> list[str]:
    """Return the modeling modules of the types, to import ahead of time; unknown types are left out."""
    known = [name for name in model_types if name in causal_lm_types()]
    names = [adapter.config_class(name).__module__ for name in known]
    return list(dict.fromkeys(modeling_module(name) for name in names))


def modeling_module(configuration: str) -> str:
    """Return the modeling module beside a configuration module."""
    head, _, tail = configuration.rpartition(".")
    return f"{head}.{tail.replace('configuration_', 'modeling_', 1)}"


def number_from(*parts: object) -> int:
    """Return a 63-bit number that depends on all parts, equal in every process."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Seed all generators and set the default dtype inside; restore both outside."""
    default, python_state, numpy_state = torch.get_default_dtype(), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # block-sparse attention draws its blocks with numpy's global generator
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _construct(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> Any:
    with seeded(seed, dtype):
        return model_class(config)


def _convert(model: nn.Module, skeleton: nn.Module, dtype: torch.dtype) -> None:
    """Give ``model`` the dtypes of a load under ``dtype``; ``skeleton`` was constructed under it."""
    kept = adapter.keeps_float32(skeleton, dtype)
    persistent = set(skeleton.state_dict(keep_vars=True))
    wanted = {name: item.dtype for name, item in skeleton.named_parameters(remove_duplicate=False)}
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in done and parameter.is_floating_point():
            done.add(id(parameter))
            parameter.data = parameter.data.to(torch.float32 if kept(name) else wanted[name])
    for prefix, module in model.named_modules():
        other = skeleton.get_submodule(prefix)
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            name, fresh = f"{prefix}.{leaf}".lstrip("."), other.get_buffer(leaf)
            if name not in persistent:
                setattr(module, leaf, fresh)
            elif buffer.is_floating_point():
                setattr(module, leaf, buffer.to(torch.float32 if kept(name) else fresh.dtype))


def _embedding(model: nn.Module, side: str) -> Any:
    """Return the ``input`` or ``output`` embedding module, ``None`` where the model does not tell."""
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        return getter() if getter is not None else None
    except NotImplementedError:  # somebody's own model
        return None


def _custom_config(spec: ModelSpec, kind: Any) -> Any:
    try:
        values = json.loads(spec.config)
    except json.JSONDecodeError as error:
        raise UsageError(f"config of {spec.model_type} must be JSON: {error}") from None
    _adjust(values, spec)
    return kind.from_dict(values)


def _adjust(values: dict[str, Any], spec: ModelSpec) -> None:
    """Apply the spec's tie and dropout to a config dict and its sub-configs."""
    values["use_cache"] = False
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            _adjust(value, spec)
        elif "layerdrop" in name:
            values[name] = 0.0
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = spec.dropout
    if spec.tie is not None:
        values["tie_word_embeddings"] = spec.tie


def _imported(name: str) -> Any:
    module, separator, qualified = name.partition(":")
    if not separator:
        raise UsageError(f"{name!r} must be 'module:QualName'")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name!r} must be importable as 'module:QualName': {error}") from None
    return found
