"""Errors, split by whose fault they are."""

from __future__ import annotations


class KitError(Exception):
    """Base of all errors that the kit raises on purpose."""


class UsageError(KitError, ValueError):
    """The caller passed something impossible: the message names the value and what it must be."""


class EnvironmentLacksError(KitError):
    """The machine or the installation lacks something: the message says what to install or change."""


class InternalError(KitError):
    """The kit itself is wrong: please report it with the message."""
