"""Shared work of one model: checkpoint, truth, DDP runs and backend runs, each done once and kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import InternalError
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.jobs import SCENARIOS, Jobs, Order, Run

#: Options that change what is right, beside how it is arrived at.
TRUTH_OPTIONS = ("split", "few", "mixed_precision", "evaluate", "nudge")


#: From a seed to the one that is tried after it; far from those that people choose.
SEED_STEP = 100_003


class OracleFailedError(InternalError):
    """Truth or DDP could not be computed: nothing can be judged."""


class SpecWork:
    """Work shared by the tests of one `ModelSpec`. Everything lies under one folder."""

    def __init__(self, jobs: Jobs, spec: ModelSpec, *, folder: Path, deadline: float, seed: int) -> None:
        self.spec = spec
        self.jobs = jobs
        #: Of weights, batches and dropout of all cases.
        self.seed = seed
        #: Whether the seed is final: something beside truth was run with it.
        self.settled = False
        self._deadline = deadline
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._warm = False
        self._runs: dict[str, Run] = {}
        self._truth: dict[str, Evidence] = {}
        self._folders = 0
        #: Activations of the armed fault over all jobs so far.
        self.fault_hits = 0

    @property
    def checkpoint(self) -> Path:
        """The folder that truth's model was saved to."""
        return self._folder / "checkpoint"

    def fresh_folder(self, name: str) -> Path:
        """Return a path that does not exist yet."""
        self._folders += 1
        return self._folder / f"{name}{self._folders}"

    def close(self) -> None:
        """Forget everything and delete the folder."""
        self._runs.clear()
        self._truth.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def reseed(self) -> None:
        """Go on with another seed; the truth of the last one and its checkpoint are forgotten.

        Raises:
            InternalError: the seed is settled.
        """
        if self.settled:
            raise InternalError(
                f"{self.spec.model_type} has been run with seed {self.seed}: it cannot take another one"
            )
        self.seed = (self.seed + SEED_STEP) % 2**32
        self._truth.clear()
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def prepare(self, cases: Sequence[Case]) -> None:
        """Compute the truth of several cases in one process; the first call writes the checkpoint."""
        wanted = {truth_key(case): truth_case(case) for case in cases if truth_key(case) not in self._truth}
        if not wanted:
            return
        run = self.job(
            "truth:run",
            {"cases": [case.to_json() for case in wanted.values()], "checkpoint": str(self.checkpoint)},
            Layout(kind="single"),
            name=f"truth of {self.spec.model_type} ({self.spec.variant})",
        )
        if run.failure:
            raise OracleFailedError(f"truth could not be computed: {run.failure}\n{run.report}")
        for index, key in enumerate(wanted):
            self._truth[key] = run.get(f"truth{index}")[0]

    def truth(self, case: Case) -> Evidence:
        """Return truth's evidence for ``case``."""
        self.prepare([case])
        return self._truth[truth_key(case)]

    @property
    def default_tie(self) -> bool | None:
        """Whether the model type is tied by default; ``None`` before any truth was computed."""
        for evidence in self._truth.values():
            return bool(evidence.facts["default_tie"])
        return None

    def ddp(self, case: Case) -> list[Evidence]:
        """Return DDP's evidence of all ranks for ``case``."""
        layout = Layout(kind="ddp", replicate=case.layout.world_size, device=case.layout.device, comm=case.layout.comm)
        oracle = replace(truth_case(case), layout=layout, backend="ddp")
        run = self.train(oracle)
        if run.failure:
            raise OracleFailedError(f"DDP could not be run: {run.failure}\n{run.report}")
        return run.get()

    def expect_ddp(self, case: Case) -> None:
        """Say that `ddp` will be asked for, before a run is waited for: the two then share ranks."""
        self.jobs.together.beside(lambda: self.ddp(case))

    def train(self, case: Case, *, follows: bool = False) -> Run:
        """Return the run of the ``train`` scenario, from the cache where it was done; ``follows`` as in `Order`."""
        return self.cached("train:run", case, {"checkpoint": str(self.checkpoint)}, follows=follows)

    def cached(self, target: str, case: Case, args: dict[str, Any], *, follows: bool = False) -> Run:
        """Run a scenario for ``case`` once."""
        plain = replace(case, options=tuple(pair for pair in case.options if pair[0] != "test"))
        key = f"{target} {plain.to_json()}"
        if key not in self._runs:
            self.prepare([] if self.checkpoint.exists() else [case])
            arguments = {"case": plain.to_json()} | args
            self._runs[key] = self.job(target, arguments, case.layout, name=describe(case), follows=follows)
        return self._runs[key]

    def job(self, target: str, args: dict[str, Any], layout: Layout, *, name: str, follows: bool = False) -> Run:
        """Run a scenario function on the layout's ranks and collect its evidence."""
        return self.run([self.order(target, args, layout, name=name, follows=follows)])[0]

    def order(self, target: str, args: dict[str, Any], layout: Layout, *, name: str, follows: bool = False) -> Order:
        """Return a scenario function on the layout's ranks as an order for `run`; ``follows`` as in `Order`."""
        case = args.get("case") or next(iter(args.get("cases", [])), "")
        if case and not self._warm:
            self._warm = True
            self.jobs.harness.warm(f"{SCENARIOS}.warm:model", {"case": case})
        return Order(
            target=target,
            args=args,
            layout=layout,
            comm="none" if layout.kind == "single" else layout.comm,
            name=name,
            deadline=self._deadline,
            role=role(target, case),
            follows=follows,
        )

    def run(self, orders: Sequence[Order]) -> list[Run]:
        """Run orders that need nothing of each other and collect their evidence."""
        self.settled = self.settled or any(order.role != "truth" for order in orders)
        runs = self.jobs.run_all(orders)
        self.fault_hits += sum(run.fault_hits for run in runs)
        return runs


def role(target: str, case: str) -> str:
    """Return whose code a job runs: truth's, the DDP oracle's, plain transformers' or that of the backend."""
    if target.startswith(("truth:", "parts:")):
        return "truth"
    if target == "saving:plain":
        return "plain"
    if target.startswith("structure:"):
        return "claims"
    if target.startswith("extended_lone:"):
        return "lone"
    return "oracle" if case and Case.from_json(case).backend == "ddp" else "backend"


def truth_case(case: Case) -> Case:
    """Return what truth depends on: the case without backend, plan, fault, most options and comm backend."""
    layout = Layout(kind="ddp", replicate=case.layout.world_size)
    options = tuple(pair for pair in case.options if pair[0] in TRUTH_OPTIONS)
    return replace(case, backend="truth", plan="auto", scenario="train", fault="", options=options, layout=layout)


def truth_key(case: Case) -> str:
    """Return the key under which truth is kept."""
    return truth_case(case).to_json()


def describe(case: Case) -> str:
    """Return a short name of a case for reports."""
    return f"{case.model.model_type} {case.model.variant} {case.scenario} {case.layout} {case.backend}"


__all__ = ["OracleFailedError", "Run", "SpecWork", "describe", "role", "truth_case", "truth_key"]
