"""The page `docs/diagnosis.md`, generated from the causes and the rules: ``python -m fsdp_testkit.diagnosis``."""

from __future__ import annotations

from fsdp_testkit.diagnosis.causes import CAUSES
from fsdp_testkit.diagnosis.diagnose import threads
from fsdp_testkit.diagnosis.rule import Rule
from fsdp_testkit.diagnosis.rules import RULES
from fsdp_testkit.diagnosis.view import MARKS, SIGNS

_HEAD = """# The diagnosis

A red row says what is wrong; the diagnosis says why, as far as the evidence tells. It is built by rules from the
findings of the row, from findings of other checks over the same evidence (buffers, dtypes, ties), and from a second
look that only red rows pay for: truth plays the first wrong step once more and records each rank's and micro-batch's
own gradient, so that a wrong gradient can be told apart into whose data is in it and with which weight; and what
the losses would be with the initial weights, or with the random numbers of the first step.

A rule picks the findings of its checks that carry its words, all of its marks and none of those it excludes, and fits
where its signs hold as well. When several fit, the one whose evidence lies nearer to a cause comes first: a lost tie
explains a wrong gradient, and a wrong gradient a wrong loss, but not the other way round. Rules are data
(`fsdp_testkit/diagnosis/rules.py`) and know no bug by name. Where no rule fits, there is no diagnosis.

`fsdp_testkit.diagnosis.diagnose(findings, run)` returns all causes that fit, nearest first; rows hold them under
`extra["diagnosis"]`. How often the first one is right over the museum, and what is taken for what:
`python -m fsdp_testkit museum --run --json score.json; python -m fsdp_testkit.diagnosis.confusion score.json`.

This page is generated from the causes and the rules: `python -m fsdp_testkit.diagnosis`.
"""


def page() -> str:
    """Return `docs/diagnosis.md`."""
    lines = [_HEAD, "## Causes", "", "The list is closed; each cause is defined by the evidence that shows it.", ""]
    lines += ["| cause | evidence |", "|---|---|"]
    lines += [f"| [{name}](#{name.lower().replace(' ', '-')}) | {cause.evidence} |" for name, cause in CAUSES.items()]
    for name, cause in CAUSES.items():
        lines += ["", f"### {name}", "", f"{cause.evidence[0].upper()}{cause.evidence[1:]}. {cause.advice}", ""]
        if cause.near[0]:
            lines += [f"Not to be mixed up with *{cause.near[0]}*: {cause.near[1]}.", ""]
        lines += ["Evidence that counts, the nearest to the cause first (place; checks; what must hold):", ""]
        lines += [f"- {_of(rule)}" for rule in RULES if rule.cause == name]
        lines += ["", "Reported: " + ", ".join(f"[{_short(url)}]({url})" for url in threads()[name])]
    return "\n".join(lines) + "\n"


def _of(rule: Rule) -> str:
    says = [f"the message has `{rule.words.replace('|', chr(92) + '|')}`"] if rule.words else []
    says += [MARKS[name].words for name in rule.marks]
    says += [f"not: {MARKS[name].words}" for name in rule.without]
    says += [SIGNS[name].words for name in rule.signs]
    says += [f"not: {SIGNS[name].words}" for name in rule.unless]
    first = "; at the first wrong step" if rule.at_first else ""
    return f"{rule.place}; {', '.join(rule.checks)}{first}; {'; '.join(says) or 'any finding'}"


def _short(url: str) -> str:
    owner, repository, _, number = url.removeprefix("https://github.com/").split("/")
    return f"{owner}/{repository}#{number}"
