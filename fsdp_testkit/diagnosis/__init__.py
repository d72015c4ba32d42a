"""From findings to a cause: rules over evidence, which are data and know no bug by name."""

from __future__ import annotations

from fsdp_testkit.diagnosis.causes import CAUSES, Cause
from fsdp_testkit.diagnosis.diagnose import Diagnosis, diagnose, nearest
from fsdp_testkit.diagnosis.seen import RunFacts, of_case, of_run

__all__ = ["CAUSES", "Cause", "Diagnosis", "RunFacts", "diagnose", "nearest", "of_case", "of_run"]
