"""What a rule is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One way in which evidence speaks for a cause.

    Attributes:
        place: order among the rules that fit; ascending.
        cause: one of `fsdp_testkit.diagnosis.causes.CAUSES`.
        checks: the checks whose findings it looks at.
        says: the sentence, with the fields of `fsdp_testkit.diagnosis.diagnose.fields`.
        words: regular expression that a finding's message, or the account of a failed job, must contain.
        marks, without: keys of `fsdp_testkit.diagnosis.view.MARKS` that must hold, and must not.
        signs, unless: keys of `fsdp_testkit.diagnosis.view.SIGNS` that must hold, and must not.
        at_first: whether findings at steps after the first wrong one, or against another oracle than truth, are
            left out: they may only follow from it.
    """

    place: int
    cause: str
    checks: tuple[str, ...]
    says: str
    words: str = ""
    marks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    at_first: bool = False


def rule(
    place: int,
    cause: str,
    checks: str,
    says: str,
    *,
    words: str = "",
    marks: str = "",
    without: str = "",
    signs: str = "",
    unless: str = "",
    at_first: bool = False,
) -> Rule:
    """Return a rule; names are separated by commas."""

    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split(", ")) if text else ()

    return Rule(
        place=place,
        cause=cause,
        checks=names(checks),
        says=says,
        words=words,
        marks=names(marks),
        without=names(without),
        signs=names(signs),
        unless=names(unless),
        at_first=at_first,
    )
