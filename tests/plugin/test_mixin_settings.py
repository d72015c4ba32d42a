"""The mixin in its settings: a plain class, a TestCase under pytest and under unittest, transformers' classes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from plugin_project import Project

from fsdp_testkit.plugin.mixin import METHODS, FSDPTesterMixin

#: Stands for a transformers config: quick to import, and all that the mixin asks of one.
FAKE_CONFIG = """
class FakeConfig:
    model_type = "fake"

    def __init__(self, hidden_size=64, dropout=0.5, **rest):
        self.hidden_size, self.dropout = hidden_size, dropout

    def to_dict(self):
        return {"hidden_size": self.hidden_size, "dropout": self.dropout, "model_type": "fake"}

    @classmethod
    def from_dict(cls, values):
        return cls(**values)

class FakeModel:
    pass
"""


@pytest.fixture
def fakes(project: Project) -> Project:
    project.pytester.makepyfile(fakes=FAKE_CONFIG)
    project.pytester.syspathinsert()
    return project


def case_of(project: Project) -> tuple[str, ...]:
    """Return (model type, test, variant, config class, model class, config JSON) of the only call."""
    (call,) = [call[2:] for call in project.calls() if call[1] == "run"]
    return call


@pytest.mark.parametrize(
    "bases", ["FSDPTesterMixin", "FSDPTesterMixin, unittest.TestCase", "unittest.TestCase, FSDPTesterMixin"]
)
def test_model_type_is_enough(project: Project, bases: str) -> None:
    project.pytester.makepyfile(
        f"""
        import unittest
        from fsdp_testkit import FSDPTesterMixin

        class TestLlama({bases}):
            model_type = "llama"
        """
    )
    project.outcomes(llama__dcp="failed", llama__resume="not_applicable")
    result = project.run("--fsdp-report=report.json")
    result.assert_outcomes(passed=len(METHODS) - 2, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["llama: dcp failed on fsdp(2) with backend reference (2 findings)"])
    assert "mixin.py" not in result.stdout.str()
    rows = project.rows()
    assert len(rows) == len(METHODS)
    assert rows["llama", "dcp", "default"] == "failed"
    assert rows["llama", "resume", "default"] == "not_applicable"


@pytest.mark.parametrize(
    "config",
    [
        "config = FakeConfig(hidden_size=32)",
        "config = lambda: FakeConfig(hidden_size=32)",
        "config = staticmethod(lambda: FakeConfig(hidden_size=32))",
        "def config(self): return FakeConfig(hidden_size=32)",
        "@classmethod\n    def config(cls): return FakeConfig(hidden_size=32)",
        "@property\n    def config(self): return FakeConfig(hidden_size=32)",
    ],
)
def test_config_in_all_its_forms(fakes: Project, config: str) -> None:
    fakes.pytester.makepyfile(
        test_it="from fakes import FakeConfig, FakeModel\nfrom fsdp_testkit import FSDPTesterMixin\n\n"
        f"class TestMine(FSDPTesterMixin):\n    {config}\n    model_class = FakeModel\n    fsdp_tests = ('dcp',)\n"
    )
    fakes.run().assert_outcomes(passed=1)
    assert case_of(fakes) == (
        "fake",
        "dcp",
        "default",
        "fakes:FakeConfig",
        "fakes:FakeModel",
        '{"dropout":0.5,"hidden_size":32}',
    )


def test_a_real_config(project: Project) -> None:
    project.pytester.makepyfile(
        """
        from transformers import LlamaConfig, LlamaForCausalLM
        from fsdp_testkit import FSDPTesterMixin

        class TestMine(FSDPTesterMixin):
            config = LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
            model_class = LlamaForCausalLM
            fsdp_tests = ("dcp",)
        """
    )
    project.run(subprocess=True).assert_outcomes(passed=1)
    model_type, _, _, config_class, model_class, config = case_of(project)
    assert model_type == "llama"
    assert config_class == "transformers.models.llama.configuration_llama:LlamaConfig"
    assert model_class == "transformers.models.llama.modeling_llama:LlamaForCausalLM"
    assert json.loads(config)["hidden_size"] == 48
    # only what differs from the defaults: it has to fit into a replay command
    assert len(config) < 400


def test_class_attributes_change_the_engine(project: Project) -> None:
    project.pytester.makepyfile(
        """
        from fsdp_testkit import FSDPTesterMixin

        class TestOne(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp", "resume")

        class TestTwo(TestOne):
            fsdp_backend = "transformers"
            fsdp_seed = 3
            fsdp_deadline = 5
            fsdp_tests = ["meta_init"]
        """
    )
    project.run("--fsdp-seed=1").assert_outcomes(passed=3)
    assert project.tests_run() == ["llama/dcp/default", "llama/resume/default", "llama/meta_init/default"]
    assert [call[1:] for call in project.calls() if call[1] in ("made", "closed")] == [
        ("made", "reference", "1", "60.0"),
        ("closed",),
        ("made", "transformers", "3", "5"),
        ("closed",),
    ]


def test_overridden_tests_are_kept(project: Project) -> None:
    project.pytester.makepyfile(
        """
        from fsdp_testkit import FSDPTesterMixin

        class TestLlama(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp", "resume")

            def test_kit_dcp(self):
                self.extra = 1
                super().test_kit_dcp()

            def test_own(self):
                assert True
        """
    )
    project.run().assert_outcomes(passed=3)
    assert project.tests_run() == ["llama/dcp/default", "llama/resume/default"]


def test_the_bare_mixin_is_not_collected(project: Project) -> None:
    with (project.path / "pyproject.toml").open("a") as file:
        file.write('\npython_classes = "*"\n')
    project.pytester.makepyfile("from fsdp_testkit import FSDPTesterMixin\ndef test_it(): pass\n")
    project.run().assert_outcomes(passed=1)


def test_plain_unittest(project: Project) -> None:
    """No pytest runs: the default engine is used, here replaced by the fake one."""
    (project.path / "conftest.py").rename(project.path / "fake_engine.py")
    (project.path / "test_plain.py").write_text(
        textwrap.dedent(
            """
            import unittest
            from fsdp_testkit import FSDPTesterMixin
            from fsdp_testkit.plugin import mixin
            from fake_engine import FakeEngine

            mixin.own_engine = FakeEngine

            class TestLlama(FSDPTesterMixin, unittest.TestCase):
                model_type = "llama"
            """
        )
    )
    project.outcomes(llama__dcp="failed", llama__resume="not_applicable")
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "-v", "test_plain"],
        check=False,
        cwd=project.path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"Ran {len(METHODS)} tests" in done.stderr
    assert "FAILED (failures=1, skipped=1)" in done.stderr
    assert "llama: dcp failed on fsdp(2) with backend reference (2 findings)" in done.stderr
    assert "not applicable: the backend cannot do that" in done.stderr
    assert [call[1] for call in project.calls()] == ["made", *["run"] * len(METHODS), "closed"]


#: The outlines of transformers 5.23's tests: the retry of ModelTesterMixin, the abstract property of its FSDP mixin.
UPSTREAM = """
import abc, functools, unittest

def retry(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        for attempt in range(2):
            try:
                return function(*args, **kwargs)
            except ConnectionError:
                if attempt:
                    raise
    return wrapper

class ModelTesterMixin:
    model_tester = None
    all_model_classes = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            if name.startswith("test_") and callable(getattr(cls, name)):
                setattr(cls, name, retry(getattr(cls, name)))

    def test_save_load(self):
        assert self.model_tester is not None

class FSDPTesterMixin(abc.ABC):
    fsdp_nproc_per_node = 2

    @property
    @abc.abstractmethod
    def model_tester(self): ...

    def test_fsdp_plan_declared(self):
        assert self.model_tester.get_config().hidden_size == 32

class CausalLMModelTester:
    from fakes import FakeConfig as config_class, FakeModel as causal_lm_class
    hidden_size = 32

    def __init__(self, parent):
        self.parent = parent
        self.hidden_dropout_prob = 0.1

    def get_config(self):
        return self.config_class(hidden_size=self.hidden_size, dropout=self.hidden_dropout_prob)
"""


@pytest.mark.parametrize(
    "bases",
    [
        "ModelTesterMixin, FSDPTesterMixin, Kit, unittest.TestCase",
        "ModelTesterMixin, Kit, FSDPTesterMixin, unittest.TestCase",
        "Kit, ModelTesterMixin, FSDPTesterMixin, unittest.TestCase",
    ],
)
def test_beside_transformers_own_mixin(fakes: Project, bases: str) -> None:
    fakes.pytester.makepyfile(upstream=UPSTREAM)
    fakes.pytester.makepyfile(
        test_it=f"""
        import unittest
        from fsdp_testkit import FSDPTesterMixin as Kit
        from upstream import CausalLMModelTester, FSDPTesterMixin, ModelTesterMixin

        class FakeModelTest({bases}):
            fsdp_tests = ("dcp", "resume")

            def setUp(self):
                self.model_tester = CausalLMModelTester(self)

            def tearDown(self):
                # what was changed for the kit was put back
                assert self.model_tester.hidden_dropout_prob == 0.1

        class FakeAllTest(FakeModelTest):
            fsdp_tests = ("meta_init",)
        """
    )
    fakes.outcomes(fake__resume="failed")
    result = fakes.run("--fsdp-report=report.json", "-m", "is_fsdp_test")
    result.assert_outcomes(passed=2, failed=1, deselected=4)
    calls = [call for call in fakes.calls() if call[1] == "run"]
    assert calls[0][2:] == (
        "fake",
        "dcp",
        "default",
        "fakes:FakeConfig",
        "fakes:FakeModel",
        '{"dropout":0.0,"hidden_size":32}',
    )
    # upstream's own tests run as ever
    fakes.run("-m", "not is_fsdp_test").assert_outcomes(passed=4, deselected=3)


def test_a_retried_test_has_one_row(fakes: Project) -> None:
    fakes.pytester.makepyfile(
        test_it="""
        import functools
        from fsdp_testkit import FSDPTesterMixin

        class TestLlama(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp",)

            def test_kit_dcp(self):
                super().test_kit_dcp()
                super().test_kit_dcp()
        """
    )
    fakes.run("--fsdp-report=report.json").assert_outcomes(passed=1)
    assert len(fakes.report()["results"]) == 1


def test_names_do_not_clash_with_transformers() -> None:
    taken = {
        "test_save_load",
        "test_fsdp2_save_load",
        "test_fsdp2_save_load_dcp",
        "test_hsdp_save_load",
        "test_fsdp2_sharding_structure",
        "test_fsdp2_plan_vs_ddp",
        "test_fsdp_plan_declared",
    }
    public = {name for name in vars(FSDPTesterMixin) if not name.startswith("_")}
    assert not public & taken
    assert public == set(METHODS)
    assert all(name.startswith("test_kit_") for name in public)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("model_type = 'lama'", "TestIt.model_type='lama' must be a causal-LM model type * near matches: llama*"),
        ("model_type = 5", "TestIt.model_type=5 must be text*"),
        ("fsdp_tests = 'dcp'", "TestIt.fsdp_tests='dcp' must be a tuple*"),
        ("fsdp_tests = ()", "TestIt.fsdp_tests=() must be a tuple with at least one of*"),
        ("fsdp_tests = ('dpc',)", "TestIt.fsdp_tests: 'dpc' must be one of * did you mean dcp?"),
        ("fsdp_test = ('dcp',)", "TestIt.fsdp_test is no attribute*did you mean fsdp_tests?"),
        ("fsdp_seed = 1.5", "TestIt.fsdp_seed=1.5 must be an integer*"),
        ("fsdp_deadline = -1", "TestIt.fsdp_deadline=-1 must be a number of seconds above 0"),
        ("fsdp_backend = 'mine'", "TestIt.fsdp_backend='mine' must be one of reference, transformers*"),
        ("fsdp_backend = None", "TestIt.fsdp_backend=None must be text*"),
        ("fsdp_trust_remote_code = 1", "TestIt.fsdp_trust_remote_code=1 must be True or False"),
    ],
)
def test_wrong_attributes_fail_when_the_class_is_made(project: Project, body: str, message: str) -> None:
    project.pytester.makepyfile(
        test_it=f"from fsdp_testkit import FSDPTesterMixin\n\nclass TestIt(FSDPTesterMixin):\n    {body}\n"
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"E * fsdp_testkit.core.errors.UsageError: {message}"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "TestIt names no model. Give the class model_type = 'llama'*"),
        ("config = FakeConfig", "TestIt.config=FakeConfig is a class*give an instance*"),
        ("config = 5", "TestIt.config=5 must be a transformers config*"),
        ("config = {'model_type': 'llama'}", "TestIt.config={'model_type': 'llama'} must be a transformers config*"),
        ("config = 'nowhere.json'", "TestIt.config='nowhere.json' must be an existing config.json, or a folder*"),
        ("config = lambda: 1 / 0", "TestIt.config() cannot be built: ZeroDivisionError: division by zero"),
        ("config = FakeConfig(object())", "TestIt.config cannot be written as JSON*"),
        ("config = FakeConfig()\n    model_class = 'x'", "TestIt.model_class='x' must be a class, or text like*"),
        (
            "config = type('Local', (FakeConfig,), {})()",
            "TestIt.config: test_it:Local cannot be imported by the ranks*",
        ),
        ("model_tester = 3", "TestIt.model_tester=3 must have a method get_config()"),
    ],
)
def test_wrong_models_are_error_rows(fakes: Project, body: str, message: str) -> None:
    fakes.pytester.makepyfile(
        test_it="from fakes import FakeConfig\nfrom fsdp_testkit import FSDPTesterMixin\n\n"
        f"class TestIt(FSDPTesterMixin):\n    fsdp_tests = ('dcp',)\n    {body}\n"
    )
    result = fakes.run("--fsdp-report=report.json")
    result.assert_outcomes(failed=1)
    assert fakes.rows()[next(iter(fakes.rows()))] == "error"
    result.stdout.fnmatch_lines([f"  {message}".replace("[", "[[]")])
    assert not fakes.tests_run()
