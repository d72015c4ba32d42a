"""The rank's side of ``@pytest.mark.ranks``: loads the test module from its file and calls the test function."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from fsdp_testkit.plugin.rank_subtests import RankSubtests
from fsdp_testkit.plugin.values import unpack

try:  # private to pytest; without it an assert that fails shows its line, but no values
    _rewrite_asserts: Any = importlib.import_module("_pytest.assertion.rewrite").rewrite_asserts
except (ImportError, AttributeError):
    _rewrite_asserts = None


class _Loader(SourceFileLoader):
    """Loads a module with its asserts rewritten, and keeps no bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code."""
        source = self.get_data(self.path)
        tree = ast.parse(source, filename=self.path)
        if _rewrite_asserts is not None:
            _rewrite_asserts(tree, source, self.path)
        code: CodeType = compile(tree, self.path, "exec", dont_inherit=True)
        return code


def call(
    context: Any, *, file: str, module: str, owner: list[str], function: str, wants: list[str], args: dict[str, Any]
) -> Any:
    """Call a test function; see `fsdp_testkit.plugin.ranks_marker`.

    Args:
        context: of the rank.
        file: of the test module.
        module: its name in the parent.
        owner: names of the classes around the function, from the outside in.
        function: its name.
        wants: those of ``rank``, ``world_size``, ``rank_context`` and ``subtests`` that it takes.
        args: the other arguments, packed.
    """
    found: Any = load(module, file)
    for name in owner:
        found = getattr(found, name)
    own = {"rank": context.rank, "world_size": context.world_size, "rank_context": context}
    if "subtests" in wants:
        own["subtests"] = RankSubtests(context.folder, context.rank)
    target = getattr(found() if owner else found, function)
    value = target(**unpack(args, context.rank), **{name: own[name] for name in wants})
    context.observe()
    return value


def load(name: str, file: str) -> ModuleType:
    """Return the module in ``file``, under the name that it has in the parent."""
    if "." in name:
        importlib.import_module(name.rpartition(".")[0])  # relative imports need it
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made
