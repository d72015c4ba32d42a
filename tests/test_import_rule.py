"""Each room imports only what ARCHITECTURE.md allows it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fsdp_testkit"
ROOMS = (
    "core",
    "ranks",
    "models",
    "reference",
    "backends",
    "scenarios",
    "checks",
    "diagnosis",
    "engine",
    "faults",
    "reporting",
    "plugin",
)
UP_TO_ENGINE = {"core", "ranks", "models", "reference", "backends", "scenarios", "checks", "diagnosis"}
#: room -> (other rooms, third-party packages); the standard library and numpy are open to all.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), set()),
    "ranks": ({"core"}, {"torch"}),
    "models": ({"core"}, {"torch", "transformers"}),
    "reference": (set(), {"torch", "transformers", "safetensors", "tqdm"}),
    "backends": ({"core", "reference"}, {"torch", "transformers"}),
    "scenarios": ({"core", "models", "backends"}, {"torch", "transformers", "safetensors"}),
    "checks": ({"core"}, set()),
    "diagnosis": ({"core"}, set()),
    "engine": (UP_TO_ENGINE, {"torch"}),
    "faults": (UP_TO_ENGINE | {"engine"}, {"torch", "transformers", "safetensors"}),
    "reporting": ({"core"}, set()),
    "plugin": (UP_TO_ENGINE | {"engine", "faults", "reporting"}, {"pytest", "xdist", "torch", "transformers"}),
}


def imports(file: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
    return found


def violations(room: str, file: Path, root: Path = PACKAGE.parent) -> list[str]:
    rooms, packages = ALLOWED[room]
    wrong = []
    for line, name in imports(file):
        top = name.split(".")[0]
        if top == "fsdp_testkit":
            target = name.split(".")[1] if "." in name else ""
            # the root re-exports public names lazily: only the outermost room may go through it
            allowed = target in rooms | {room} or (target == "" and room == "plugin")
        else:
            allowed = top in sys.stdlib_module_names or top == "numpy" or top in packages
        if not allowed:
            wrong.append(f"{file.relative_to(root)}:{line}: {room} must not import {name}")
    return wrong


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files, f"no file in {room}"
    assert not [text for file in files for text in violations(room, file)]


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == set(ROOMS)


def test_the_rule_sees_a_violation(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import torch\nfrom fsdp_testkit.engine import engine\n")
    wrong = violations("core", probe, tmp_path)
    assert len(wrong) == 2
    assert "probe.py:1: core must not import torch" in wrong[0]
