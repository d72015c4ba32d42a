"""How often the first cause is the expected one, and which causes are taken for each other.

``python -m fsdp_testkit.diagnosis.confusion SCORE.json`` prints both from what the museum's ``--json`` wrote.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

#: Causes that are easily mixed up, in both directions.
PAIRS: tuple[tuple[str, str], ...] = (
    ("tie lost", "never reduced"),
    ("optimizer on other tensors", "forward reads other weights"),
    ("optimizer on other tensors", "trained set changed"),
    ("wrong normaliser", "wrong factor"),
    ("buffer not filled", "weight not loaded"),
    ("buffer not filled", "buffer differs between ranks"),
    ("wrong slice", "weight not loaded"),
    ("wrong slice", "padded rows lost"),
    ("collective mismatch", "rank stuck"),
    ("rank died", "collective mismatch"),
    ("memory held", "switch without effect"),
    ("state not restored", "RNG not restored"),
    ("wrong dtype", "rounding only"),
)
Named = Sequence[tuple[str, str]]


def share(named: Named) -> float:
    """Return the share of (expected, named) pairs that are equal.

    Raises:
        ValueError: there are none.
    """
    if not named:
        raise ValueError("named=[] must hold at least one pair: no bug was diagnosed")
    return sum(expected == cause for expected, cause in named) / len(named)


def confusion_lines(named: Named) -> list[str]:
    """Return two tables: the pairs of `PAIRS` with how often each was right and taken for the other; and the rest."""
    counts = Counter(named)
    lines = [
        "| cause | other cause | cause named right | cause taken for the other | other taken for the cause |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {left} | {right} | {counts[left, left]} | {counts[left, right]} | {counts[right, left]} |"
        for left, right in PAIRS
    ]
    wrong = sorted((pair, count) for pair, count in counts.items() if pair[0] != pair[1])
    lines += ["", "| expected | named | times |", "|---|---|---|"]
    return lines + [f"| {expected} | {cause or '(none)'} | {count} |" for (expected, cause), count in wrong]


def from_score(text: str) -> list[tuple[str, str]]:
    """Return (expected, named) of the bugs that were run, from the museum's JSON."""
    faults = json.loads(text)["faults"]
    return [(item["expected"][0], item["diagnosis"]) for item in faults if item["diagnosis_right"] is not None]


if __name__ == "__main__":
    pairs = from_score(Path(sys.argv[1]).read_text(encoding="utf-8"))
    right = sum(expected == cause for expected, cause in pairs)
    lines = [f"first cause right: {right} of {len(pairs)} ({share(pairs):.0%})", "", *confusion_lines(pairs)]
    sys.stdout.write("\n".join(lines) + "\n")
