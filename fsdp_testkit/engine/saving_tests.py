"""Tests of saving beyond the core: offloaded, over the folder that was loaded, and restored on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fsdp_testkit.checks.resharding import check_restored, check_unharmed, full_state
from fsdp_testkit.checks.saving import check_buffers_kept, check_files, check_reload, check_trained, trained_weights
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.outcome import Outcome, judged
from fsdp_testkit.engine.tests import FSDP2, auto_case, is_tied, judge_load, load_order
from fsdp_testkit.engine.work import Run, SpecWork

if TYPE_CHECKING:
    from fsdp_testkit.engine.engine import Engine

FSDP4 = Layout(kind="fsdp", shard=4)
#: where what was saved on four ranks is restored; layouts of one size share a job
ELSEWHERE = (["fsdp(1)"], ["fsdp(2)"], ["fsdp(3)"], ["hsdp(2, 2)"])
FORMATS = ("safetensors", "dcp")


def offloaded_save(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Parameters that live on the CPU: trained, saved in each format, loaded again."""
    case = replace(engine.case(work, "offloaded_save", FSDP2, steps=2), scenario="save").with_options(cpu_offload=True)
    formats = tuple(name for name in FORMATS if name in engine.capabilities)
    return [saved_and_reloaded(engine, work, case, "saving:save", formats, nothing_more)]


def save_over(engine: Engine, work: SpecWork) -> list[Outcome]:
    """A save over the folder that was loaded from, some weights frozen: the model goes on, and the folder is right."""
    case = replace(engine.case(work, "save_over", FSDP2, steps=2, freeze=True), scenario="save_over")
    return [saved_and_reloaded(engine, work, case, "resharding:save_over", FORMATS[:1], unharmed)]


def reshard_resume(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Weights, optimizer and schedule saved on four ranks, restored on 1, 2, 3 and 2 x 2: the same to the bit."""
    case = replace(engine.case(work, "reshard_resume", FSDP4, steps=2), scenario="reshard").with_options(format="dcp")
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])
    folder = work.fresh_folder("resharded")
    arguments = {"case": case.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)}
    saved = work.job("resharding:save", arguments, case.layout, name=f"{work.spec.model_type} save at {case.layout}")
    outcome = judged(case, saved, lambda: check_trained(saved.get()))
    for layouts in () if saved.failure else ELSEWHERE:
        outcome.verdict.add(restored_elsewhere(work, case, folder, saved, layouts))
    return [outcome]


SAVING: dict[str, Callable[[Engine, SpecWork], list[Outcome]]] = {
    "offloaded_save": offloaded_save,
    "save_over": save_over,
    "reshard_resume": reshard_resume,
}


def unharmed(run: Run) -> Verdict:
    """Judge the model after the save."""
    return check_unharmed(run.get())


def nothing_more(run: Run) -> Verdict:
    """Judge nothing of the run beyond what is always judged."""
    del run
    return Verdict.empty()


def saved_and_reloaded(
    engine: Engine, work: SpecWork, case: Case, target: str, formats: tuple[str, ...], check: Callable[[Run], Verdict]
) -> Outcome:
    """Save in each format, judge the files, and load them again on two ranks."""
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])
    outcome = Outcome(layout=str(case.layout), case=case)
    for layout in formats:
        this = case.with_options(format=layout)
        folder = work.fresh_folder(layout)
        arguments = {"case": this.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)}
        run = work.job(target, arguments, this.layout, name=f"{work.spec.model_type} {this.scenario} {layout}")
        part = judged(this, run, lambda run=run: check_trained(run.get()).add(check(run)))  # type: ignore[misc]
        if not run.failure:
            full = trained_weights(run.get(), this.layout)
            if layout == "safetensors":
                part.verdict.add(check_files(folder, work.checkpoint, is_tied(work.truth(auto_case(engine, work, "")))))
            layouts = [str(this.layout)]
            (loaded,) = work.run([load_order(work, this, folder, layouts)])
            part.verdict.add(judge_load(this, run, full, layouts, loaded))
        outcome.verdict.add(part.verdict)
        outcome.extra |= part.extra
        outcome.case = this if part.verdict.findings else outcome.case
    return outcome


def restored_elsewhere(work: SpecWork, case: Case, folder: Path, saved: Run, layouts: list[str]) -> Verdict:
    """Restore under other layouts of one world size and judge weights, buffers and training state."""
    first = Layout.parse(layouts[0], device=case.layout.device, comm=case.layout.comm)
    arguments = {"case": case.to_json(), "folder": str(folder), "layouts": layouts}
    run = work.job("resharding:restore", arguments, first, name=f"{work.spec.model_type} restored at {layouts[0]}")
    if run.failure:
        return judged(case, run, Verdict.empty).verdict
    full, state = trained_weights(saved.get(), case.layout), full_state(saved.get(), case.layout)
    verdict = Verdict.empty()
    for index, text in enumerate(layouts):
        loaded, at = run.get(f"load{index}"), Layout.parse(text)
        verdict.add(check_reload(loaded, full, at, f"at {text}"))
        verdict.add(check_buffers_kept(saved.get()[0], loaded, f"at {text}"))
        verdict.add(check_restored(saved.get(), state, loaded, at))
    return verdict
