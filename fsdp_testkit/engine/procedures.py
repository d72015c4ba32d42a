"""The procedures of all tiers, by test."""

from __future__ import annotations

from fsdp_testkit.engine.extended_tests import EXTENDED
from fsdp_testkit.engine.saving_tests import SAVING
from fsdp_testkit.engine.tests import PROCEDURES as CORE

PROCEDURES = CORE | EXTENDED | SAVING
