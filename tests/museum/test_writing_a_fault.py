"""The example of docs/writing-a-fault.md does what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from fsdp_testkit.faults import parts
from fsdp_testkit.faults.base import Fault

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "writing-a-fault.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_is_red_for_its_own_reason(tmp_path: Path) -> None:
    (example,) = blocks("python")
    (command,), (outcome,) = blocks("sh"), blocks("text")
    (tmp_path / "my_faults.py").write_text(example)
    words = shlex.split(command.replace("model_matrix", str(ROOT / "model_matrix")))
    run = subprocess.run(
        [sys.executable, *words[1:], "--fsdp-report", "report.json", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert outcome.strip() in run.stdout
    (row,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert row["extra"]["fault_hits"] > 0
    wrong = [finding for finding in row["findings"] if finding["check"] == "gradients"]
    first = min(finding["step"] for finding in wrong)
    assert {finding["parameter"] for finding in wrong if finding["step"] == first} == {"model.embed_tokens.weight"}
    assert "my_faults:EmbeddingFlushed" in wrong[0]["replay"]


def test_the_page_names_what_there_is() -> None:
    doors, bases = PAGE.split("Methods of")[1].split("Bases in")
    first_cells = re.findall(r"^\|([^|]*)\|", doors, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)\(", cell)}
    public = {name for name in vars(Fault) if not name.startswith("_") and callable(getattr(Fault, name))}
    assert named == public - {"hit", "arm", "wrap"}
    kinds = {kind for kind in vars(parts).values() if isinstance(kind, type) and issubclass(kind, Fault)} - {Fault}
    assert set(re.findall(r"^\| `(\w+)` \|", bases, re.MULTILINE)) == {kind.__name__ for kind in kinds}
