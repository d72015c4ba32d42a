"""docs/findings.md: numbered in order, each cause with its row and its script, and README counts them right."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\d+)\. (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| (\d+) \| \[.+\]\(#(.+?)\) \| (.+?) \|", PAGE, re.MULTILINE)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: https://docs.github.com/en/get-started/writing-on-github."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_causes_are_numbered_in_order() -> None:
    assert [int(number) for number, _, _ in SECTIONS] == list(range(1, len(SECTIONS) + 1))
    assert len(SECTIONS) > 10


def test_each_row_links_to_its_section() -> None:
    assert [link for _, link, _ in ROWS] == [anchor(f"{number}. {title}") for number, title, _ in SECTIONS]
    assert [number for number, _, _ in ROWS] == [number for number, _, _ in SECTIONS]


def test_each_cause_has_its_own_script() -> None:
    named = [re.findall(r"^\$ python (findings/\w+\.py)$", text, re.MULTILINE) for _, _, text in SECTIONS]
    assert sorted(path for paths in named for path in paths) == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "findings").glob("*.py")
    )
    assert all(len(paths) == 1 for paths in named)


def test_scripts_that_the_ledger_names_exist() -> None:
    ledger = tomllib.loads((ROOT / "model_matrix" / "known_failures.toml").read_text(encoding="utf-8"))
    named = {entry["reproduction"] for entry in ledger["entry"] if "reproduction" in entry}
    assert len(named) > 5
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]


def test_readme_counts_the_causes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"\(docs/findings\.md\): (\d+) causes, (\d+) of them silent", readme)
    assert said is not None
    silent = [row for row in ROWS if row[2].startswith("**silent**")]
    assert [int(number) for number in said.groups()] == [len(SECTIONS), len(silent)]
