"""One thing to run: a model, a layout, a backend, a plan, a scenario. JSON, hashable, replayable."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.layout import Layout

#: Declared meanings of "the" gradient of a step over ranks and micro-batches.
#: ``rank_mean``: mean over ranks and micro-batches of each one's own mean loss.
#: ``token_mean``: each one's mean loss weighted by its share of all valid tokens of the step.
NORMALISERS = ("rank_mean", "token_mean")
DTYPES = ("float32", "float64", "bfloat16")
#: What fills memory that a load leaves uninitialised (option ``poison``): NaN, or finite numbers.
POISONS = ("nan", "garbage")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model under test.

    Attributes:
        model_type: transformers' model type, or a free name for a custom config.
        tie: requested ``tie_word_embeddings``; ``None`` keeps the config's own value.
        config: ``""`` when the catalogue's tiny rules build the config; else JSON of ``config.to_dict()``.
        config_class: ``module:QualName``, needed with ``config`` unless there is ``code``.
        model_class: ``module:QualName``; ``""`` asks the causal-LM mapping.
        code: absolute path of a folder whose ``auto_map`` names the classes; ``""`` for none. To name it is no leave
            to run it: who runs the case has to say that.
        dropout: probability given to every dropout field of the config (0 switches them off).
        adapters: whether the model has low-rank adapters (see ``models.adapted``); a case that freezes then
            freezes all else.
    """

    model_type: str
    tie: bool | None = None
    config: str = ""
    config_class: str = ""
    model_class: str = ""
    code: str = ""
    dropout: float = 0.0
    adapters: bool = False

    def __post_init__(self) -> None:
        if not self.model_type:
            raise UsageError("model_type='' must be a name such as 'llama'")
        if self.config and not self.config_class and not self.code:
            raise UsageError(f"config_class must be 'module:QualName' where config is given ({self.model_type})")
        if not isinstance(self.code, str) or (self.code and not PurePath(self.code).is_absolute()):
            raise UsageError(f"code={self.code!r} must be the absolute path of a folder ({self.model_type})")
        if self.code and (self.config_class or self.model_class or not self.config):
            raise UsageError(f"code={self.code!r} names the classes itself, and needs a config ({self.model_type})")

    @property
    def variant(self) -> str:
        """``tied``, ``untied`` or ``default``."""
        return "default" if self.tie is None else ("tied" if self.tie else "untied")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one run does.

    Attributes:
        model: the model under test.
        layout: arrangement of ranks.
        backend: ``reference``, ``transformers``, ``package.module:Class``; ``truth`` and ``ddp`` are the oracles.
        plan: ``auto``, ``manual``, or JSON text of a plan.
        scenario: name of the scenario that the ranks run.
        normalisers: cycled over the steps, each one of `NORMALISERS`.
        max_norms: cycled over the steps; 0 means that the norm is measured and nothing is clipped.
        dtype: parameter dtype, one of `DTYPES`.
        seed: of weights, batches and dropout.
        steps: optimizer steps.
        micro_batches: forward/backward passes in each step.
        freeze: whether the kit's frozen subset (see ``models.plans.frozen_subset``) is frozen.
        fault: ``module:Class`` of an armed fault, or ``""``.
        options: further scenario options, sorted pairs of name and JSON text; ``poison`` is one of `POISONS`.
    """

    model: ModelSpec
    layout: Layout
    backend: str = "reference"
    plan: str = "auto"
    scenario: str = "train"
    normalisers: tuple[str, ...] = ("rank_mean", "token_mean")
    max_norms: tuple[float, ...] = (0.0,)
    dtype: str = "float32"
    seed: int = 0
    steps: int = 5
    micro_batches: int = 1
    freeze: bool = False
    fault: str = ""
    options: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        for name in self.normalisers:
            if name not in NORMALISERS:
                raise UsageError(f"normalisers={name!r} must be one of {', '.join(NORMALISERS)}")
        if not self.normalisers:
            raise UsageError("normalisers=() must name at least one normaliser")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.steps < 0 or self.micro_batches < 1:
            raise UsageError(f"steps={self.steps} must be >= 0, micro_batches={self.micro_batches} >= 1")
        if (poison := self.option("poison", "nan")) not in POISONS:
            raise UsageError(f"poison={poison!r} must be one of {', '.join(POISONS)}")
        if not self.max_norms or any(norm < 0 for norm in self.max_norms):
            raise UsageError(f"max_norms={self.max_norms} must hold numbers >= 0")

    def option(self, name: str, default: Any = None) -> Any:
        """Return the option ``name``, decoded from JSON, or ``default``."""
        for key, text in self.options:
            if key == name:
                return json.loads(text)
        return default

    def with_options(self, **values: Any) -> Case:
        """Return a copy with further options."""
        merged = dict(self.options) | {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
        return replace(self, options=tuple(sorted(merged.items())))

    def normaliser(self, step: int) -> str:
        """Return the normaliser of ``step`` (0-based)."""
        return self.normalisers[step % len(self.normalisers)]

    def max_norm(self, step: int) -> float:
        """Return the clipping bound of ``step``; 0 means no clipping."""
        return self.max_norms[step % len(self.max_norms)]

    def to_json(self) -> str:
        """Return compact, canonical JSON; values equal to their defaults are left out."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Rebuild a case from `to_json`.

        Raises:
            UsageError: the text is not JSON or names unknown fields.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"case={text[:80]!r} must be the JSON printed with a failure: {error}") from None
        if not isinstance(raw, dict) or "model" not in raw or "layout" not in raw:
            raise UsageError(f"case={text[:80]!r} must be a JSON object with 'model' and 'layout'")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(raw.keys() - known):
            raise UsageError(f"case has unknown fields {unknown}; known are {sorted(known)}")
        raw["model"] = _build(ModelSpec, raw["model"])
        raw["layout"] = _build(Layout, raw["layout"])
        for name in ("normalisers", "max_norms"):
            if name in raw:
                raw[name] = tuple(raw[name])
        if "options" in raw:
            raw["options"] = tuple(tuple(pair) for pair in raw["options"])
        return cls(**raw)

    @property
    def key(self) -> str:
        """Short stable name of the case, usable in file names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def replay_command(case: str) -> str:
    """Return the shell command that runs a case again; who runs it has to see that it runs code of a folder."""
    consent = "--trust-remote-code " if json.loads(case).get("model", {}).get("code") else ""
    return f"python -m fsdp_testkit replay {consent}{shlex.quote(case)}"


@functools.lru_cache(maxsize=1024)
def _to_json(case: Case) -> str:
    return json.dumps(_slim(case), sort_keys=True, separators=(",", ":"))


def _build(kind: type[Any], raw: Any) -> Any:
    known = {item.name for item in fields(kind)}
    if not isinstance(raw, dict) or raw.keys() - known:
        raise UsageError(f"{kind.__name__} must be a JSON object with fields among {sorted(known)}; got {raw!r}"[:300])
    return kind(**raw)


def _slim(case: Case) -> dict[str, Any]:
    def slim(value: Any, whole: dict[str, Any]) -> dict[str, Any]:
        defaults = {item.name: item.default for item in fields(value)}
        return {name: part for name, part in whole.items() if defaults[name] != getattr(value, name)}

    whole = asdict(case)
    result = slim(case, whole)
    result["model"] = slim(case.model, whole["model"])
    result["layout"] = slim(case.layout, whole["layout"])
    return result
