"""`ModelMatrix`: a place in a test module that the plugin fills with one class per selected model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.models import catalogue
from fsdp_testkit.plugin.mixin import FSDPTesterMixin


class ModelMatrix:
    """Stands in a test module for one test class per model: ``matrix = ModelMatrix()``.

    ``--fsdp-models`` chooses the models; without it the matrix holds ``default``.

    Args:
        default: what ``--fsdp-models`` takes, used where the user chose nothing.
    """

    _fsdp_kit_role: ClassVar[str] = "matrix"

    def __init__(self, default: str = "all") -> None:
        self.default = default

    def classes(self, chosen: Sequence[str] | None, module: str) -> list[type[FSDPTesterMixin]]:
        """Return the test classes of the chosen models, or of the default ones.

        Args:
            chosen: model types, and absolute paths of config files and folders.
            module: name of the module that is to hold them.

        Raises:
            UsageError: two models lead to the same class name.
        """
        models = catalogue.select(self.default) if chosen is None else chosen
        return list(_unique(model_class(name, module) for name in models))


def model_class(model: str, module: str) -> type[FSDPTesterMixin]:
    """Return the test class of a model type, of a config file or of a folder with one."""
    body: dict[str, object] = {"__module__": module}
    if catalogue.is_path(model):
        path = Path(model)
        body["config"] = str(path)
        # most of these files are called config.json: their folder tells them apart
        name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    else:
        name = model
        body["model_type"] = model
        body["_fsdp_kit_impossible"] = catalogue.IMPOSSIBLE.get(model, "")
    body["__doc__"] = f"All tests of the kit for {model}."
    return type(class_name(name), (FSDPTesterMixin,), body)


def class_name(name: str) -> str:
    """Return the name of a model's class in the matrix."""
    return f"Test{catalogue.class_safe(name)}"


def _unique(classes: Iterable[type[FSDPTesterMixin]]) -> Iterable[type[FSDPTesterMixin]]:
    seen: set[str] = set()
    for cls in classes:
        if cls.__name__ in seen:
            raise UsageError(f"two of the selected models lead to the class name {cls.__name__}: select one of them")
        seen.add(cls.__name__)
        yield cls
