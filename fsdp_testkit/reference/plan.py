"""How a model is cut into FSDP units: the plan as plain, validated data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from fsdp_testkit.reference.errors import PlanError

#: transformers' words for one unit
WORDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "free_full_weight": {"reshard_after_forward": True},
        "keep_full_weight": {"reshard_after_forward": False},
        "cpu_offload": {"cpu_offload": True},
        "mixed_precision": {"mixed_precision": "bfloat16"},
    }
)

PRECISIONS = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleOptions:
    """Options of one FSDP unit.

    Attributes:
        reshard_after_forward: free the full weights after forward; ``None`` leaves the choice to
            ``fully_shard`` (free, except in the root).
        cpu_offload: keep parameters, gradients and optimizer state in CPU memory.
        mixed_precision: compute in this dtype (``"bfloat16"`` or ``"float16"``), reduce gradients in fp32.
    """

    reshard_after_forward: bool | None = None
    cpu_offload: bool = False
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        if self.reshard_after_forward is not None and not isinstance(self.reshard_after_forward, bool):
            raise PlanError(f"reshard_after_forward={self.reshard_after_forward!r} must be True, False or None")
        if not isinstance(self.cpu_offload, bool):
            raise PlanError(f"cpu_offload={self.cpu_offload!r} must be True or False")
        if self.mixed_precision is not None and self.mixed_precision not in PRECISIONS:
            raise PlanError(f"mixed_precision={self.mixed_precision!r} must be one of {PRECISIONS} or None")

    def with_defaults(self, other: ModuleOptions) -> ModuleOptions:
        """Return these options, with the other's offload and precision where these have none."""
        return replace(
            self,
            cpu_offload=self.cpu_offload or other.cpu_offload,
            mixed_precision=self.mixed_precision or other.mixed_precision,
        )

    @classmethod
    def parse(cls, value: Any) -> ModuleOptions:
        """Read options from a `ModuleOptions`, a dict, or one or several of transformers' words.

        Raises:
            PlanError: ``value`` has another form, or its words contradict each other.
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            known = {f.name for f in fields(cls)}
            if unknown := sorted(set(map(str, value)) - known):
                raise PlanError(f"options {unknown} are unknown; known are {sorted(known)}")
            return cls(**value)
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, Iterable):
            raise PlanError(f"options={value!r} must be a dict, a word or a list of words")
        options: dict[str, Any] = {}
        for word in words:
            if not isinstance(word, str) or word not in WORDS:
                raise PlanError(f"option {word!r} is unknown; known words are {sorted(WORDS)}")
            for name, setting in WORDS[word].items():
                if options.setdefault(name, setting) != setting:
                    raise PlanError(f"options={list(words)} contradict each other in {name}")
        return cls(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which modules become FSDP units of their own.

    Attributes:
        mode: ``"auto"`` (embedding, each repeated block, final norm with output head) or ``"manual"``.
        modules: pattern -> options. A pattern is a module's fully qualified name in which ``*`` stands for
            one component; ``""`` is the root. Only for ``"manual"``.
        options: what holds for all units: their ``cpu_offload`` and ``mixed_precision`` where they have none of
            their own. Modules that the model keeps in fp32 stay out of a ``mixed_precision`` given here.
    """

    mode: str = "auto"
    modules: Mapping[str, ModuleOptions] = field(default_factory=dict)
    options: ModuleOptions = field(default_factory=ModuleOptions)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "manual"):
            raise PlanError(f"mode={self.mode!r} must be 'auto' or 'manual'")
        if not isinstance(self.modules, Mapping):
            raise PlanError(f"modules={self.modules!r} must be a dict of pattern -> options")
        if self.mode == "auto" and self.modules:
            raise PlanError("mode='auto' takes no modules; use mode='manual'")
        parsed: dict[str, ModuleOptions] = {}
        for pattern, options in self.modules.items():
            if not isinstance(pattern, str) or (pattern and not all(pattern.split("."))):
                raise PlanError(f"pattern {pattern!r} must be a module name such as 'model.layers.*'")
            try:
                parsed[pattern] = ModuleOptions.parse(options)
            except PlanError as error:
                raise PlanError(f"pattern {pattern!r}: {error}") from None
        object.__setattr__(self, "modules", MappingProxyType(parsed))
        object.__setattr__(self, "options", ModuleOptions.parse(self.options))
        if self.options.reshard_after_forward is not None:
            raise PlanError("options of all units must leave reshard_after_forward to each of them")

    @classmethod
    def parse(cls, value: Any) -> Plan:
        """Read a plan.

        Args:
            value: a `Plan`; ``"auto"``; ``{"mode": ..., "modules": {pattern: options}, "options": {...}}``; or
                transformers' form ``{pattern: "free_full_weight" | [words]}``.

        Raises:
            PlanError: ``value`` has another form.
        """
        if isinstance(value, cls):
            return value
        if value == "auto":
            return cls()
        if not isinstance(value, Mapping):
            raise PlanError(f"plan={value!r} must be 'auto', a Plan, or a dict of module patterns")
        known = ["mode", "modules", "options"]
        if any(key in value for key in known):
            if unknown := sorted(set(map(str, value)) - set(known)):
                raise PlanError(f"plan has unknown keys {unknown}; known are {known}")
            options = ModuleOptions.parse(value.get("options"))
            return cls(mode=value.get("mode", "manual"), modules=value.get("modules", {}), options=options)
        if not value:
            raise PlanError("plan={} names no module; use 'auto', or {'': {}} for one unit in all")
        return cls(mode="manual", modules=value)
