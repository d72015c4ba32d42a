"""Folders of models with code of their own: what is read of them before that code may run. Imports no torch.

Such a folder holds a ``config.json`` whose ``auto_map`` names classes in ``.py`` files beside it
(https://huggingface.co/docs/transformers/custom_models). Nothing here runs that code; `remote_code` does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import UsageError

#: Key of ``auto_map`` that names the model's class.
MODEL = "AutoModelForCausalLM"
#: Environment variable of ranks whose user has agreed to run the code of folders: a case alone never does.
CONSENT = "FSDP_TESTKIT_TRUST_REMOTE_CODE"
_CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*)\.[A-Za-z_]\w*")


def read_config(label: str, folder: str | Path) -> dict[str, Any]:
    """Return the ``config.json`` of a folder.

    Args:
        label: what the folder is called in messages.
        folder: its path.

    Raises:
        UsageError: there is none, or it is no JSON object with a ``model_type``.
    """
    file = Path(folder) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{label}={str(folder)!r} must be a folder with a config.json: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise UsageError(f"{label}: {file} must be a JSON object with a model_type")
    return values


def has_own_code(values: dict[str, Any]) -> bool:
    """Return whether a config names classes of its own folder."""
    return bool(values.get("auto_map"))


def check_code(label: str, folder: str | Path, *, trusted: bool, option: str) -> dict[str, Any]:
    """Return the config of a folder whose model may be run.

    Args:
        label: what the folder is called in messages.
        folder: its path.
        trusted: whether the user agreed to run code of such folders.
        option: how the user agrees.

    Raises:
        UsageError: the folder has code and the user did not agree, or the code is not all there. The message names
            the folder, and the option.
    """
    values = read_config(label, folder)
    if not has_own_code(values):
        return values
    if not trusted:
        raise UsageError(
            f"{label}={str(folder)!r} has a model with code of its own (auto_map in its config.json), and testing it "
            f"would run the code of that folder: say {option} if you trust it"
        )
    names = values["auto_map"]
    if not isinstance(names, dict) or MODEL not in names:
        raise UsageError(f"{label}={str(folder)!r}: auto_map in config.json must name the class {MODEL}")
    for key in ("AutoConfig", MODEL):
        if key in names:
            _check_class(f"{label}={str(folder)!r}: auto_map[{key!r}]", Path(folder), names[key])
    return values


def _check_class(label: str, folder: Path, name: Any) -> None:
    found = _CLASS.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        hint = "; code of another repository is never fetched" if "--" in str(name) else ""
        raise UsageError(f"{label}={name!r} must look like 'modeling_file.Class'{hint}")
    if not (folder / f"{found['module']}.py").is_file():
        raise UsageError(f"{label}={name!r} needs the file {found['module']}.py in that folder")
