"""The engine: runs one test of one model and returns its result rows."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.core.result import Result
from fsdp_testkit.core.versions import check_supported
from fsdp_testkit.engine.catalogue_of_tests import TESTS
from fsdp_testkit.engine.jobs import Jobs
from fsdp_testkit.engine.outcome import Outcome
from fsdp_testkit.engine.procedures import PROCEDURES
from fsdp_testkit.engine.tests import prepare
from fsdp_testkit.engine.work import OracleFailedError, SpecWork
from fsdp_testkit.models.own_code import CONSENT, check_code
from fsdp_testkit.ranks import Harness, Hosts, Slots
from fsdp_testkit.ranks.mirror import STAYS

#: Modules that every rank needs: imported once in the server that ranks are forked from.
PRELOAD = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.experimental",
    "torch.nn.parallel",
    "torch.optim.lr_scheduler",
    "torch.testing._internal.distributed.fake_pg",
    "torch.utils.module_tracker",
    "torch.utils.serialization.config",
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.modeling_rope_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.models.auto.modeling_auto",
    "fsdp_testkit.scenarios.warm",
    "fsdp_testkit.scenarios.batch",
    "fsdp_testkit.scenarios.train",
    "fsdp_testkit.scenarios.truth",
    "fsdp_testkit.scenarios.saving",
    "fsdp_testkit.scenarios.resume",
    "fsdp_testkit.scenarios.meta",
    "fsdp_testkit.scenarios.structure",
    "fsdp_testkit.scenarios.parts",
    "fsdp_testkit.backends.reference",
    "fsdp_testkit.backends.ddp",
    # the package imports these when they are asked for
    "fsdp_testkit.reference.load",
    "fsdp_testkit.reference.save",
    "fsdp_testkit.reference.training",
)


#: Where transformers keeps its copies of the code of models' folders, in the harness's; each host has its own.
MODULES = f"{STAYS}modules"
#: How a user agrees to run such code.
CONSENT_OPTION = "--fsdp-trust-remote-code (fsdp_trust_remote_code = True in a test class)"
#: A test and its variant.
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How tests are run.

    Attributes:
        backend: ``reference``, ``transformers`` or ``package.module:Class``.
        device: ``cpu`` or ``cuda``.
        start_method: ``forkserver`` or ``spawn``.
        seed: of weights, batches and dropout.
        deadline: seconds for one job.
        fault: ``module:Class`` armed in every job of the backend, or ``""``.
        trust_remote_code: whether the user agreed to run the code of a model's folder (``ModelSpec.code``).
    """

    backend: str = "reference"
    device: str = "cpu"
    start_method: str = "forkserver"
    seed: int = 0
    deadline: float = 60.0
    fault: str = ""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device={self.device!r} must be 'cpu' or 'cuda'")
        if self.start_method not in ("forkserver", "spawn"):
            raise UsageError(f"start_method={self.start_method!r} must be 'forkserver' or 'spawn'")
        if not self.deadline > 0 or self.deadline == float("inf"):
            raise UsageError(f"deadline={self.deadline} must be a positive, finite number of seconds")


class Engine:
    """Runs tests. Cheap to build; ranks' server and folder appear with the first test.

    Work shared by the tests of a model is kept until a test of another model is asked for.

    Args:
        settings: how tests are run.
        slots: where jobs wait for cores that they share with other processes.
        hosts: agents that start the ranks; ``None`` starts them on this machine.
    """

    def __init__(self, settings: Settings, slots: Slots | None = None, hosts: Hosts | None = None) -> None:
        self.settings = settings
        self._slots = slots
        self._hosts = hosts
        self._harness: Harness | None = None
        self._folder: Path | None = None
        self._works: dict[ModelSpec, SpecWork] = {}
        self._jobs: Jobs | None = None
        #: What `expect` announced and was not asked for yet, and what of it is done.
        self._expected: dict[ModelSpec, list[Cell]] = {}
        self._done: dict[tuple[ModelSpec, Cell], list[Result]] = {}
        #: Fault activations of models that were forgotten.
        self._past_hits = 0

    def run_test(self, spec: ModelSpec, test: str, variant: str) -> list[Result]:
        """Run one test of one model in one variant.

        Args:
            spec: the model; its ``tie`` is replaced by the variant's.
            test: a key of `TESTS`.
            variant: ``untied``, ``tied`` or ``default``.

        Returns:
            one row or more; a model that fails gives rows that say so.

        Raises:
            UsageError: unknown test or variant, or a model with code that nobody agreed to run.
            EnvironmentLacksError: torch or transformers is missing or of an unsupported version.
        """
        if test not in TESTS:
            raise UsageError(f"test={test!r} must be one of {', '.join(TESTS)}")
        if variant not in ("untied", "tied", "default"):
            raise UsageError(f"variant={variant!r} must be 'untied', 'tied' or 'default'")
        if spec.code:
            check_code(
                f"{spec.model_type}: code", spec.code, trusted=self.settings.trust_remote_code, option=CONSENT_OPTION
            )
        cell = (test, variant)
        if (spec, cell) in self._done and not self.settings.fault:
            return self._done.pop((spec, cell))
        expected = self._expected.pop(spec, [])
        if cell not in expected or self.settings.fault or len(expected) < 2:
            return self._rows(spec, cell)
        self._run_together(spec, expected)
        return self._done.pop((spec, cell))

    def expect(self, spec: ModelSpec, cells: Iterable[Cell]) -> None:
        """Say which tests of a model will be asked for: the first `run_test` then runs all of them.

        Their jobs share ranks, which takes a third of the time. Nothing is run that is not asked for later,
        and a test that was not announced, or is asked for again, runs alone. An armed fault has no company.

        Args:
            spec: the model, as `run_test` will get it.
            cells: (test, variant) of each.
        """
        self._expected[spec] = [cell for cell in dict.fromkeys(cells) if (spec, cell) not in self._done]

    def _run_together(self, spec: ModelSpec, cells: list[Cell]) -> None:
        together = self.work(self._variant(spec, cells[0][1])).jobs.together
        # what is the default variant shows in the truth of any other
        explicit = dict.fromkeys(variant for _, variant in cells if variant != "default")
        together.all([partial(prepare, self, self.work(self._variant(spec, variant))) for variant in explicit])
        ended = together.all([partial(self._rows, spec, cell) for cell in cells])
        for cell, end in zip(cells, ended, strict=True):
            if end.error is not None:
                raise end.error
            assert end.value is not None
            for row in end.value:
                row.seconds = round(end.seconds / len(end.value), 4)
            self._done[spec, cell] = end.value

    def _variant(self, spec: ModelSpec, variant: str) -> ModelSpec:
        tie = {"untied": False, "tied": True, "default": None}[variant]
        return replace(spec, tie=tie) if tie is not None else self._default(spec)

    def _rows(self, spec: ModelSpec, cell: Cell) -> list[Result]:
        test, variant = cell
        spec = self._variant(spec, variant)
        procedure: Callable[[Engine, SpecWork], list[Outcome]] = PROCEDURES[test]
        started = time.monotonic()
        hits_before = self._hits()
        missing = self._missing_capabilities(test)
        try:
            outcomes = (
                [Outcome.not_applicable(f"backend {self.settings.backend} cannot express: {', '.join(missing)}")]
                if missing
                else procedure(self, self.work(spec))
            )
        except OracleFailedError as error:
            outcomes = [Outcome.error(str(error))]
        except UsageError:
            raise
        except Exception:  # whatever breaks in the parent is an error of this row, not of the session
            outcomes = [Outcome.error(traceback.format_exc())]
        work = self._works.get(spec)
        if work is not None and work.seed != self.settings.seed:
            for outcome in outcomes:
                outcome.extra["seed"] = work.seed
        if self.settings.fault and not missing:
            judge_hits(outcomes, self._hits() - hits_before)
        seconds = (time.monotonic() - started) / len(outcomes)
        return [outcome.to_result(spec, test, variant, self.settings.backend, seconds) for outcome in outcomes]

    def run_case(self, case: Case) -> list[Result]:
        """Run the test that a replay case names, with the case's backend, seed and fault.

        Raises:
            UsageError: the case names no test.
        """
        test = case.option("test")
        if test not in TESTS:
            raise UsageError(f"case names test={test!r}; it must be one of {', '.join(TESTS)}")
        settings = replace(self.settings, backend=case.backend, seed=case.seed, fault=case.fault)
        other = Engine(replace(settings, device=case.layout.device))
        try:
            rows = other.run_test(case.model, test, case.model.variant)
        finally:
            other.close()
        same = [row for row in rows if row.layout == str(case.layout)]
        return same or rows

    def armed(self, fault: str) -> Engine:
        """Return an engine with ``fault`` armed that shares this one's ranks' server, truth and checkpoints.

        Close this engine only, and use one of the two at a time.
        """
        self._start()
        other = copy.copy(self)
        other.settings = replace(self.settings, fault=fault)
        return other

    def close(self) -> None:
        """End the ranks' server and delete all work files."""
        self._forget()
        if self._harness is not None:
            self._harness.close()
            self._harness = self._jobs = None
            gc.unfreeze()
        self._folder = None

    def case(self, work: SpecWork, test: str, layout: Layout, **fields: object) -> Case:
        """Return a case of the backend under test with this engine's settings and the seed of ``work``."""
        layout = self._placed(layout)
        case = Case(
            model=work.spec,
            layout=layout,
            backend=self.settings.backend,
            seed=work.seed,
            fault=self.settings.fault,
        )
        return replace(case, **fields).with_options(test=test)  # type: ignore[arg-type]

    def _placed(self, layout: Layout) -> Layout:
        if self.settings.device == "cpu":
            return layout
        import torch

        from fsdp_testkit.ranks import pick_comm

        comm, _ = pick_comm("cuda", layout.world_size, torch.cuda.device_count())
        return replace(layout, device="cuda", comm=comm)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the backend under test can express."""
        from fsdp_testkit.backends.registry import make_backend

        return make_backend(self.settings.backend).capabilities

    def _missing_capabilities(self, test: str) -> list[str]:
        return sorted(TESTS[test].needs - self.capabilities)

    def work(self, spec: ModelSpec) -> SpecWork:
        """Return the shared work of a spec; asking for another model forgets the last one's."""
        if spec in self._works:
            return self._works[spec]
        if any(same_model(known) != same_model(spec) for known in self._works):
            self._forget()
        self._start()
        assert self._folder is not None
        assert self._jobs is not None
        folder = Path(tempfile.mkdtemp(prefix=f"{spec.model_type}-{spec.variant}-", dir=self._folder))
        self._works[spec] = SpecWork(
            self._jobs, spec, folder=folder, deadline=self.settings.deadline, seed=self.settings.seed
        )
        return self._works[spec]

    def _default(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the tie that the model type has by default, where it is known already.

        It is then the same work as one of the two variants, and nothing is computed twice.
        """
        for known, work in self._works.items():
            if same_model(known) == same_model(spec) and work.default_tie is not None:
                return replace(spec, tie=work.default_tie)
        return replace(spec, tie=None)

    def _start(self) -> None:
        if self._harness is None:
            check_supported()
            regroups = self._hosts is None and "regroup" in self.capabilities
            # the harness's own folder goes also where this process is killed
            self._harness = Harness(
                start_method=self.settings.start_method,
                preload=PRELOAD,
                slots=self._slots,
                scale_deadlines=True,
                hosts=self._hosts,
            )
            if self.settings.trust_remote_code:
                self._harness.env.update(consent(self._harness.folder))
            self._jobs = Jobs(self._harness, regroups=regroups)
            self._folder = self._harness.folder / "models"
            self._folder.mkdir()
            # evidence is made of many small objects: the collector would look through all of torch for each model
            gc.freeze()

    def _hits(self) -> int:
        return self._past_hits + sum(work.fault_hits for work in self._works.values())

    def _forget(self) -> None:
        self._past_hits = self._hits()
        for work in self._works.values():
            work.close()
        self._works.clear()
        self._done.clear()


def consent(folder: Path) -> dict[str, str]:
    """Return the environment of ranks that may run the code of a model's folder.

    transformers keeps its copy of such code under the harness's folder, which goes with it, and fetches nothing. It
    reads these variables when it is imported:
    https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
    """
    return {CONSENT: "1", "HF_MODULES_CACHE": str(folder / MODULES), "HF_HUB_OFFLINE": "1"}


def same_model(spec: ModelSpec) -> ModelSpec:
    """Return the spec without what differs between the tests of one model."""
    return replace(spec, tie=None, dropout=0.0, adapters=False)


def judge_hits(outcomes: list[Outcome], hits: int) -> None:
    """An armed fault that was never hit proves nothing: say so in the first row."""
    outcomes[0].extra["fault_hits"] = hits
    outcomes[0].verdict.expect(
        hits > 0,
        check="fault_hits",
        message="the armed fault was never hit: this run proves nothing",
        judged_by="kit",
    )
