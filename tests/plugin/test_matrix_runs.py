"""Whole runs of a matrix: outcomes, terminal, report, xdist."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_project import Project

from fsdp_testkit.core.result import SCHEMA
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.plugin import scheduling
from fsdp_testkit.plugin.mixin import METHODS
from fsdp_testkit.plugin.options import RUN_OPTIONS, EngineOptions, RunOptions

CELLS = set(METHODS.values())


def test_all_green(matrix: Project) -> None:
    result = matrix.run("--fsdp-models", "llama,gpt2", "--fsdp-report", "report.json")
    assert result.ret == 0
    result.assert_outcomes(passed=2 * len(METHODS))
    assert matrix.rows() == {(model, *cell): "passed" for model in ("llama", "gpt2") for cell in CELLS}
    result.stdout.fnmatch_lines(
        ["fsdp_testkit 0.1.0, torch *, transformers *, backend reference, cpu (gloo), seed 0, *2 models"]
    )
    result.stdout.fnmatch_lines(["model * struct * buffers * auto * manual * hsdp * save * dcp * resume * meta"])
    result.stdout.fnmatch_lines(["llama * . . *"])
    result.stdout.fnmatch_lines([f"2 models, {2 * len(METHODS)} rows: {2 * len(METHODS)} passed"])
    result.stdout.fnmatch_lines([f"{20 * len(METHODS)} checks, *; largest relative error that passed 1e-08*"])


def test_engine_is_made_once_and_closed(matrix: Project) -> None:
    matrix.run("--fsdp-models", "llama,gpt2")
    what = [call[1] for call in matrix.calls()]
    assert what[0] == "made"
    assert what[-1] == "closed"
    assert what.count("made") == what.count("closed") == 1


def test_items_of_a_model_stay_together(matrix: Project) -> None:
    matrix.run("--fsdp-models", "mixtral,llama")
    models = [call.split("/")[0] for call in matrix.tests_run()]
    assert models == ["mixtral"] * len(METHODS) + ["llama"] * len(METHODS)


def test_failure_text(matrix: Project) -> None:
    matrix.outcomes(llama__dcp="failed")
    result = matrix.run("--fsdp-models", "llama", "-k", "dcp")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "llama: dcp failed on fsdp(2) with backend reference (2 findings)",
            "  1. gradients: the gradient differs from truth's",
            "     where     ranks 0, 1, step 2, model.layers.0.mlp.up_proj.weight",
            "     expected  0.5",
            "     actual    1.0",
            "     error     0.5 absolute, 1 relative, tolerance 1e-06 relative",
            "     judged by truth; logic: it is still there in float64",
            "    python -m fsdp_testkit replay '{*}'",
        ],
    )
    # the kit's own frames help nobody
    assert "mixin.py" not in result.stdout.str()


@pytest.mark.parametrize("arguments", [(), ("-n2",), ("-n2", "--dist=load")])
def test_every_outcome_has_its_row(matrix: Project, arguments: tuple[str, ...]) -> None:
    matrix.outcomes(
        llama__dcp="failed",
        llama__resume="raise",
        llama__meta_init="not_applicable",
        gpt2__save_load=[{"layout": "fsdp(2)"}, {"layout": "fsdp(3)", "outcome": "failed"}],
        gpt2__dcp=[],
        gpt2__resume=[{"checks": 0}],
    )
    result = matrix.run("--fsdp-models", "llama,gpt2", "--fsdp-report=report.json", "--junitxml=unit.xml", *arguments)
    assert result.ret == 1
    document = matrix.report()
    assert document["schema"] == SCHEMA
    assert document["environment"]["torch"]
    assert document["environment"]["options"]["models"] == ["llama", "gpt2"]
    rows = matrix.rows()
    assert {cell[1:] for cell in rows} == CELLS
    assert rows["llama", "dcp", "default"] == "failed"
    assert rows["llama", "resume", "default"] == "error"
    assert rows["llama", "meta_init", "default"] == "not_applicable"
    assert rows["gpt2", "dcp", "default"] == "error"
    assert rows["gpt2", "resume", "default"] == "error"
    results = document["results"]
    assert len(results) == 2 * len(METHODS) + 2  # save_load of gpt2 has two layouts, twice
    assert results == sorted(results, key=lambda row: (row["model_type"], row["test"], row["variant"], row["layout"]))
    result.assert_outcomes(passed=2 * len(METHODS) - 7, failed=6, skipped=1)
    # rows are no business of JUnit's
    tree = ElementTree.parse(matrix.path / "unit.xml")
    assert not list(tree.iter("property"))
    assert len(list(tree.iter("testcase"))) == 2 * len(METHODS)


def workers_of_models(project: Project) -> dict[str, set[str]]:
    workers: dict[str, set[str]] = {}
    for call in project.calls():
        if call[1] == "run":
            workers.setdefault(call[2], set()).add(call[0])
    return workers


def test_with_n_each_model_stays_on_one_worker(matrix: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "cores", lambda: 2)
    result = matrix.run("--fsdp-models", "llama,gpt2,mixtral", "-n2")
    result.assert_outcomes(passed=3 * len(METHODS))
    workers = workers_of_models(matrix)
    assert all(len(pids) == 1 for pids in workers.values())
    assert len(set.union(*workers.values())) == 2
    # one engine for each worker, and every one closed
    made = [call[0] for call in matrix.calls() if call[1] == "made"]
    closed = [call[0] for call in matrix.calls() if call[1] == "closed"]
    assert sorted(made) == sorted(closed)
    assert len(made) == 2


def test_models_go_to_no_more_workers_than_have_a_core(matrix: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "cores", lambda: 2)
    result = matrix.run("--fsdp-models", "llama,gpt2,mixtral,qwen3,phi", "-n4")
    result.assert_outcomes(passed=5 * len(METHODS))
    assert len(set.union(*workers_of_models(matrix).values())) == 2


@pytest.mark.parametrize("counts", [True, False])
def test_the_largest_model_is_the_first(matrix: Project, tmp_path: Path, counts: bool) -> None:
    sizes = {"llama": 2, "gpt2": 9, "mixtral": 5}
    recorded = {model: {"dcp default": [1, 1, size - 1], "resume default": [1, 1, 1]} for model, size in sizes.items()}
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"schema": "fsdp_testkit counts 1", "counts": {"reference": recorded}}))
    models = [*sizes, "qwen3"]
    matrix.run("--fsdp-models", ",".join(models), "-n1", *(["--fsdp-counts", str(file)] if counts else []))
    order = list(dict.fromkeys(call[2] for call in matrix.calls() if call[1] == "run"))
    # of what is not recorded nothing is known
    assert order == (["gpt2", "mixtral", "llama", "qwen3"] if counts else models)


def test_workers_are_superfluous_only_where_they_would_have_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "cores", lambda: 2)

    def config(**fields: Any) -> Any:
        engine = EngineOptions(device=fields.pop("device", "cpu"))
        return SimpleNamespace(stash={RUN_OPTIONS: RunOptions(engine=engine, **fields)})

    models = ["test_matrix.py::TestLlama::test_kit_dcp", "test_matrix.py::TestGPT2::test_kit_dcp"]
    assert [scheduling.superfluous(config(), models, workers) for workers in (1, 2, 3, 6)] == [0, 0, 1, 4]
    # whoever has tests of another kind wants them on all workers
    assert scheduling.superfluous(config(), [*models, "test_other.py::test_mine"], 6) == 0
    assert scheduling.superfluous(config(), [], 6) == 0
    # these ranks keep other machines or GPUs busy
    assert scheduling.superfluous(config(hosts=("a", "b")), models, 6) == 0
    assert scheduling.superfluous(config(device="cuda"), models, 6) == 0


def test_a_chosen_distribution_is_kept(matrix: Project) -> None:
    result = matrix.run("--fsdp-models", "llama", "-n2", "--dist=load", "-v")
    result.stdout.fnmatch_lines(["scheduling tests via LoadScheduling"])


@pytest.mark.parametrize("workers", ["-n2", "-n4"])
@pytest.mark.parametrize("method", ["sharding_structure", "dcp"])
def test_rows_of_finished_items_survive_a_dead_worker(matrix: Project, method: str, workers: str) -> None:
    matrix.outcomes(**{f"llama__{method}": "die"})
    result = matrix.run("--fsdp-models", "llama,gpt2", workers, "--fsdp-report=report.json", subprocess=True)
    assert result.ret == 1
    rows = matrix.rows()
    deaths = dict.fromkeys(TESTS[method].variants, "error")
    assert {cell[2]: outcome for cell, outcome in rows.items() if cell[:2] == ("llama", method)} == deaths
    assert list(rows.values()).count("passed") == 2 * len(METHODS) - len(deaths)


def test_not_applicable_is_said(matrix: Project) -> None:
    matrix.outcomes(llama__dcp="not_applicable")
    result = matrix.run("--fsdp-models", "llama", "-rs")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["- the backend cannot do that (1: llama)"])
    result.stdout.fnmatch_lines(["SKIPPED*not applicable: the backend cannot do that"])
    result.stdout.fnmatch_lines(["*passed, 1 not applicable"])


def test_nothing_checked_is_an_error(matrix: Project) -> None:
    matrix.outcomes(llama="not_applicable")
    result = matrix.run("--fsdp-models", "llama")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["ERROR fsdp_testkit: not a single check was run in 14 rows: the backend cannot do that"]
    )


def test_results_asked_for_and_none_there(project: Project) -> None:
    project.pytester.makepyfile(test_other="def test_it(): pass")
    result = project.run("--fsdp-models", "llama")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["ERROR fsdp_testkit: no FSDP test was run, although --fsdp-models asked*"])
    # without a wish the kit keeps quiet
    result = project.run()
    assert result.ret == 0
    assert "ERROR" not in result.stdout.str()


def test_impossible_models_have_rows_with_the_reason(matrix: Project) -> None:
    result = matrix.run("--fsdp-models", "gemma3n,llama", "--fsdp-report=report.json")
    assert result.ret == 0
    rows = [row for row in matrix.report()["results"] if row["model_type"] == "gemma3n"]
    assert {row["outcome"] for row in rows} == {"not_applicable"}
    assert "timm" in rows[0]["reason"]
    assert not any(call.startswith("gemma3n") for call in matrix.tests_run())


def test_k_finds_model_types(matrix: Project) -> None:
    result = matrix.run("-k", "modernbert-decoder and hsdp", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*::TestModernbertDecoder::test_kit_hsdp_vs_ddp_tied"])
    assert "TestLlama" not in result.stdout.str()
    result = matrix.run("test_matrix.py::TestLlama::test_kit_dcp")
    result.assert_outcomes(passed=1)
    result = matrix.run("-m", "is_fsdp_test and fsdp", "--fsdp-models", "llama")
    result.assert_outcomes(passed=len(METHODS))


def test_all_models_are_the_default(matrix: Project) -> None:
    from fsdp_testkit.models.catalogue import causal_lm_types

    result = matrix.run("--collect-only", "-q")
    result.stdout.fnmatch_lines([f"{len(causal_lm_types()) * len(METHODS)} tests collected in *"])


def test_many_models_fold(matrix: Project) -> None:
    matrix.outcomes(zamba2__dcp="failed")
    result = matrix.run("--fsdp-models", "all", "-k", "dcp", "--tb=no", "-r", "N")
    result.stdout.fnmatch_lines(
        ["model * dcp*", "zamba2 * F*", "... and * more models without a failure (-v shows them)"]
    )
    assert "\nllama " not in result.stdout.str()


def test_config_file_as_model(matrix: Project) -> None:
    folder = matrix.path / "my_model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}))
    result = matrix.run("--fsdp-models", "my_model/config.json", "-k", "dcp", "-v", subprocess=True)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*::TestMyModel::test_kit_dcp PASSED*"])
    (call,) = [call for call in matrix.calls() if call[1] == "run"]
    assert call[2] == "llama"
    assert call[5].endswith(":LlamaConfig")
    assert json.loads(call[7])["hidden_size"] == 64


def test_skips_and_broken_fixtures_have_rows(project: Project) -> None:
    project.pytester.makepyfile(
        """
        import pytest
        from fsdp_testkit import FSDPTesterMixin

        class TestLlama(FSDPTesterMixin):
            model_type = "llama"
            fsdp_tests = ("dcp", "resume")

            @pytest.fixture(autouse=True)
            def broken(self, request):
                if "resume" in request.node.name:
                    raise OSError("no disk")

            @pytest.mark.skip(reason="not today")
            def test_kit_dcp(self):
                pass
        """
    )
    result = project.run("--fsdp-report=report.json")
    assert result.ret == 1
    assert project.rows() == {("llama", "dcp", "default"): "skipped", ("llama", "resume", "default"): "error"}
    reasons = [row["reason"] for row in project.report()["results"]]
    assert "not today" in reasons[0]
    assert "no disk" in reasons[1]


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_an_engine_that_does_not_close_fails_the_run_but_keeps_the_report(matrix: Project, workers: str) -> None:
    with (matrix.path / "conftest.py").open("a") as file:
        file.write("\n\ndef broken(self):\n    raise OSError('a rank is left')\n\nFakeEngine.close = broken\n")
    result = matrix.run("--fsdp-models=llama", "-k", "dcp", "--fsdp-report=report.json", workers)
    assert result.ret == 1
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["ERROR fsdp_testkit: the engine could not be closed: OSError: a rank is left"])
    assert matrix.rows() == {("llama", "dcp", "default"): "passed"}
