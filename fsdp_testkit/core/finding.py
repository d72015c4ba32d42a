"""One thing that is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a check found wrong.

    Attributes:
        check: name of the check, such as ``gradients``.
        message: one sentence that stands alone.
        rank: the rank where it was seen, ``None`` where it concerns all of them.
        step: 0-based optimizer step, ``None`` outside a step.
        parameter: FQN of the parameter or buffer, or file key; ``""`` where none is meant.
        expected: what should be there, as short text.
        actual: what was there, as short text.
        max_abs_error: largest absolute difference, where numbers were compared.
        max_rel_error: the same over the largest expected magnitude of that tensor.
        tolerance: the relative bound that was applied.
        judged_by: the oracle: ``truth``, ``ddp``, ``rules``, ``file``, ``uninterrupted``...
        nature: ``logic``, ``rounding``, ``undecided`` where the model does not run in fp64, or ``""``.
        detail: plain facts that tell causes apart, such as the ratio to the expected values; see
            `fsdp_testkit.checks.signature`.
    """

    check: str
    message: str
    rank: int | None = None
    step: int | None = None
    parameter: str = ""
    expected: str = ""
    actual: str = ""
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    tolerance: float | None = None
    judged_by: str = "rules"
    nature: str = ""
    detail: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", {})}


@dataclass(slots=True)
class Verdict:
    """What checks return: findings, and how much was looked at.

    Attributes:
        findings: what is wrong; empty when all is well.
        checks: number of single assertions evaluated.
        tensors: number of tensors compared.
        max_abs_error: largest absolute difference seen, also among those within tolerance.
        max_rel_error: largest difference over the largest expected magnitude of its tensor.
        tolerance: the largest relative bound applied.
    """

    findings: list[Finding]
    checks: int = 0
    tensors: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    tolerance: float = 0.0

    @classmethod
    def empty(cls) -> Verdict:
        """Return a verdict over nothing."""
        return cls(findings=[])

    def expect(self, holds: bool, finding: Finding | None = None, /, **fields: Any) -> bool:
        """Count one assertion; where it does not hold, record ``finding`` (or one built from ``fields``)."""
        self.checks += 1
        if not holds:
            self.findings.append(finding if finding is not None else Finding(**fields))
        return holds

    def add(self, other: Verdict) -> Verdict:
        """Merge ``other`` into this verdict and return it."""
        self.findings.extend(other.findings)
        self.checks += other.checks
        self.tensors += other.tensors
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.max_rel_error = max(self.max_rel_error, other.max_rel_error)
        self.tolerance = max(self.tolerance, other.tolerance)
        return self
