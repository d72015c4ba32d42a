"""Projects for the tests of this folder."""

from __future__ import annotations

import numpy as np  # noqa: F401 - pytester forgets modules that a run imported, and numpy cannot be imported twice
import pytest
from plugin_project import Project


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """Return a project with a fake engine."""
    return Project(pytester)


@pytest.fixture
def matrix(project: Project) -> Project:
    """Return a project that holds a matrix, as ``model_matrix`` does."""
    project.pytester.makepyfile(test_matrix="from fsdp_testkit import ModelMatrix\nmatrix = ModelMatrix()\n")
    return project
