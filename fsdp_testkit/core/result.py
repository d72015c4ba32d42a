"""Result rows: one per (model, test, variant, layout, backend)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "fsdp_testkit.report/1"
OUTCOMES = ("passed", "failed", "xfailed", "xpassed", "skipped", "not_applicable", "error")
#: Outcomes that make the pytest item fail.
BAD_OUTCOMES = frozenset({"failed", "xpassed", "error"})


@dataclass(slots=True, kw_only=True)
class Result:
    """One row of the report.

    Attributes:
        model_type, test, variant, layout, backend: what was run.
        outcome: one of `OUTCOMES`.
        cause: id of the ledger entry, ``""`` where none applies.
        reason: one sentence: why it is not applicable or skipped, or the first finding.
        seconds: wall time spent for this row (shared work counts where it was done first).
        max_abs_error, max_rel_error, tolerance: as in `Verdict`; ``None`` where nothing was compared.
        checks: assertions evaluated.
        tensors: tensors compared.
        findings: `Finding.to_dict` of each, with ``replay`` (a command) added.
        extra: further measured facts (bytes, counts).
    """

    model_type: str
    test: str
    variant: str
    layout: str
    backend: str
    outcome: str
    cause: str = ""
    reason: str = ""
    seconds: float = 0.0
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    tolerance: float | None = None
    checks: int = 0
    tensors: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
