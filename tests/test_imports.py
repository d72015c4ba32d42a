"""What an import costs and drags in; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fsdp_testkit

HEAVY = ("torch", "transformers")


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import fsdp_testkit",
        "from fsdp_testkit import Case, Evidence, Finding, Layout, ModelSpec, Result",
        "import fsdp_testkit.plugin.entry",
        "from fsdp_testkit import FSDPTesterMixin, ModelMatrix",
        "import fsdp_testkit.cli",
        "import fsdp_testkit.engine.ledger, fsdp_testkit.engine.catalogue_of_tests",
        "import fsdp_testkit.engine.engine",
        "import fsdp_testkit.plugin.options as o; o.check_backend('x', 'transformers')",
    ],
)
def test_light_imports(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


def test_collecting_the_matrix_imports_no_torch() -> None:
    code = "import pytest; assert pytest.main(['--collect-only', '-q', 'model_matrix', '-p', 'no:cacheprovider']) == 0"
    assert not modules_after(code) & set(HEAVY)


def test_pytests_own_process_needs_no_transformers() -> None:
    code = "from fsdp_testkit.backends.registry import make_backend; make_backend('reference')"
    assert "transformers" not in modules_after(code)


def test_reporting_needs_no_pytest() -> None:
    assert "pytest" not in modules_after(
        "import fsdp_testkit.reporting.matrix, fsdp_testkit.reporting.report, fsdp_testkit.engine.ledger"
    )


def test_reference_needs_no_pytest() -> None:
    assert "pytest" not in modules_after("import fsdp_testkit.reference")


def test_public_names() -> None:
    assert fsdp_testkit.__all__ == sorted(fsdp_testkit.__all__)
    assert set(fsdp_testkit.__all__) <= set(dir(fsdp_testkit))
    for name in fsdp_testkit.__all__:
        assert getattr(fsdp_testkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fsdp_testkit.nothing
