"""The rules as data: what they name exists, they know no bug, and the page says what they say."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest

from fsdp_testkit.core.finding import Finding
from fsdp_testkit.diagnosis import CAUSES, RunFacts, diagnose, nearest
from fsdp_testkit.diagnosis.confusion import PAIRS, confusion_lines, from_score, share
from fsdp_testkit.diagnosis.diagnose import fields, threads
from fsdp_testkit.diagnosis.page import page
from fsdp_testkit.diagnosis.rule import Rule
from fsdp_testkit.diagnosis.rules import RULES
from fsdp_testkit.diagnosis.view import MARKS, SIGNS, View
from fsdp_testkit.faults import museum
from fsdp_testkit.faults.bugs import BUGS

ROOM = Path(museum.__file__).parents[1] / "diagnosis"
PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.place} {rule.cause}")
def test_a_rule_names_what_there_is(rule: Rule) -> None:
    assert rule.cause in CAUSES
    assert rule.checks
    assert {*rule.marks, *rule.without} <= MARKS.keys()
    assert {*rule.signs, *rule.unless} <= SIGNS.keys()
    re.compile(rule.words)
    known = fields([Finding(check="c", message="m")], View((), RunFacts()))
    assert {name for _, name, _, _ in string.Formatter().parse(rule.says) if name} <= known.keys()


def test_every_cause_mark_and_sign_is_used() -> None:
    assert {rule.cause for rule in RULES} == CAUSES.keys()
    assert {mark for rule in RULES for mark in (*rule.marks, *rule.without)} == MARKS.keys()
    assert {sign for rule in RULES for sign in (*rule.signs, *rule.unless)} == SIGNS.keys()
    assert {cause.near[0] for cause in CAUSES.values()} <= {*CAUSES, ""}


def test_no_rule_knows_a_bug() -> None:
    names = {
        name
        for entry in museum.entries()
        for name in (entry.bug, entry.fault.__name__ if entry.fault is not None else "")
        if name
    }
    assert len(names) > 190
    for file in ROOM.glob("*.py"):
        words = set(re.findall(r"[\w-]+", file.read_text()))
        assert not words & names, file
        assert "fsdp_testkit.faults" not in file.read_text()


def test_every_cause_has_public_threads() -> None:
    assert threads().keys() == CAUSES.keys()
    assert all(urls and len(set(urls)) == len(urls) for urls in threads().values())
    assert all(url.startswith("https://github.com/") for urls in threads().values() for url in urls)
    public = {thread for thread, _ in BUGS.values()}
    listed = {url for urls in threads().values() for url in urls}
    assert {entry.thread for entry in museum.entries() if entry.real} <= listed
    assert len(listed - public) <= 1


def test_page_is_what_the_rules_say() -> None:
    assert PAGE.read_text() == page(), "run python -m fsdp_testkit.diagnosis"


def test_nothing_found_is_no_diagnosis() -> None:
    assert diagnose([]) == []
    assert diagnose([Finding(check="batches", message="all ranks have the same data")]) == []


def test_several_causes_are_ranked_and_later_rows_do_not_hide_a_nearer_one() -> None:
    lost = Finding(check="ties", message="a and b are no longer one object: the tie was lost", rank=0)
    wrong = Finding(check="initial_weights", message="w differs", rank=0, parameter="w", detail={"nonfinite": 1.0})
    causes = [item.cause for item in diagnose([wrong], hints=[lost])]
    assert causes == ["tie lost", "weight not loaded"]
    rows = [[item.to_dict() for item in diagnose(found)] for found in ([wrong], [], [lost])]
    chosen = nearest(rows)
    assert chosen is not None
    assert chosen["cause"] == "tie lost"
    assert nearest([[], []]) is None


def test_stacks_are_no_evidence() -> None:
    died = Finding(check="ranks", message="rank 1 of 2 raised ValueError: no", rank=1)
    inside = "rank 1 raised\n  Traceback\n    raise TypeError('same dtype')\n  ValueError: no"
    assert [item.cause for item in diagnose([died], report=inside)] == ["rank died"]
    said = inside + "\n  all must have the same dtype"
    assert [item.cause for item in diagnose([died], report=said)] == ["wrong dtype", "rank died"]


def test_confusion_counts_what_was_named_instead() -> None:
    named = [("tie lost", "never reduced"), ("tie lost", "tie lost"), ("rank died", "")]
    assert share(named) == pytest.approx(1 / 3)
    lines = confusion_lines(named)
    assert "| tie lost | never reduced | 1 | 1 | 0 |" in lines
    assert all(left in CAUSES and right in CAUSES for left, right in PAIRS)
    with pytest.raises(ValueError, match="no bug"):
        share([])


def test_pairs_are_read_from_the_score_of_the_museum() -> None:
    score = {
        "faults": [
            {"expected": ["tie lost", "never reduced"], "diagnosis": "tie lost", "diagnosis_right": True},
            {"expected": [], "diagnosis": "", "diagnosis_right": None},
        ]
    }
    assert from_score(json.dumps(score)) == [("tie lost", "tie lost")]


def test_a_sentence_is_said_of_all_that_it_holds_for() -> None:
    def unit(name: str, kind: str) -> Finding:
        return Finding(
            check="structure", message=f"{kind}{name} is not an FSDP unit of its own", parameter=name, rank=0
        )

    found = [unit("h.0", "block "), unit("h.1", "block "), unit("wte", "the input embedding ")]
    assert diagnose(found)[0].text == "block `h.*` is not an FSDP unit of its own, on rank 0"
    # a name inside a longer one is another name
    longer = Finding(check="structure", message="norm and head (h.bias) are not one FSDP unit", parameter="h", rank=0)
    assert diagnose([longer])[0].text == f"{longer.message}, on rank 0"
