"""The extended tier: one procedure per test, in the manner of `fsdp_testkit.engine.tests`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fsdp_testkit.checks import extended as checks
from fsdp_testkit.checks.saving import check_loading_info, check_reload, trained_weights
from fsdp_testkit.checks.steps import check_guard
from fsdp_testkit.checks.training import check_batches, check_initial, check_movement, check_training
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.explain import look_closer
from fsdp_testkit.engine.judge import judge_training
from fsdp_testkit.engine.outcome import Outcome, judged
from fsdp_testkit.engine.tests import FSDP2, MAX_NORMS, auto_case, doubted_again, ignored_tie, settle
from fsdp_testkit.engine.work import Run, SpecWork
from fsdp_testkit.models.plans import manual_plan

if TYPE_CHECKING:
    from fsdp_testkit.engine.engine import Engine

#: World sizes and meshes beside those of the core tier: one rank, an odd number, a mesh axis of size 1.
SHAPES = (
    Layout(kind="fsdp", shard=1),
    Layout(kind="fsdp", shard=3),
    Layout(kind="hsdp", replicate=1, shard=2),
    Layout(kind="hsdp", replicate=2, shard=1),
)
DROPOUT = 0.2
#: A bound that clips in every step.
ALWAYS = (0.02,)
#: Values of the option ``few`` that are tried until experts are idle on some ranks only.
FEW = tuple(range(6))
FORMATS = ("safetensors", "dcp")


def accumulation(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Three micro-batches, reduced once and reduced each time: the same gradients, and the reductions counted."""
    case = engine.case(work, "accumulation", FSDP2, steps=2, micro_batches=3, max_norms=ALWAYS).with_options(split=3)
    if same := ignored_tie(work, case):
        return [same]
    each = case.with_options(reduce_each=True)
    outcome = trained(work, case)
    other = trained(work, each)
    outcome.verdict.add(other.verdict)
    outcome.extra |= {name: value for name, value in other.extra.items() if name not in outcome.extra}
    once, often = watched(work, case), watched(work, each)
    if not once.failure and not often.failure:
        outcome.verdict.add(checks.check_reductions(once.get(), often.get(), case.micro_batches))
    return [outcome]


def mesh_shapes(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Training on one rank, on three, and on meshes with an axis of size 1."""
    auto = auto_case(engine, work, "mesh_shapes")
    if same := ignored_tie(work, auto):
        return [same]
    cases = [engine.case(work, "mesh_shapes", layout, max_norms=MAX_NORMS) for layout in SHAPES]
    return [trained(work, case, "train:run") for case in cases]


def adapters(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Adapters beside frozen weights on three ranks: some ranks hold no row of some of them."""
    work = engine.work(replace(work.spec, adapters=True))
    case = engine.case(work, "adapters", SHAPES[1], steps=3, freeze=True, max_norms=(0.0, 0.0, 1e-5))
    return [trained(work, case, "train:run")]


def checkpointing(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Activation checkpointing with dropout, against truth without checkpointing."""
    work = engine.work(replace(work.spec, dropout=DROPOUT))
    case = dropout_case(engine, work, "checkpointing")
    if not work.truth(case).facts["recomputes"]:
        return [Outcome.not_applicable("this model type does not support activation checkpointing")]
    case = case.with_options(activation_checkpointing=True)
    outcome = trained(work, case)
    if not (run := watched(work, case)).failure:
        outcome.verdict.add(checks.check_recomputed(run.get()))
    return [outcome]


def evaluation(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Evaluation after every step: right losses, no trace, and training goes on as if it had not been."""
    work = engine.work(replace(work.spec, dropout=DROPOUT))
    case = dropout_case(engine, work, "evaluation")
    outcome = trained(work, case)
    if not (run := watched(work, case)).failure:
        outcome.verdict.add(checks.check_evaluation(run.get(), work.truth(case), case))
    return [outcome]


def mixed_precision(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Computation in bf16, reduction and update in fp32, against truth that casts what is not kept in fp32."""
    case = engine.case(work, "mixed_precision", FSDP2, steps=3).with_options(mixed_precision="bfloat16")
    truth = work.truth(case)
    run = watched(work, case)
    # DDP has no public mixed precision of this kind: truth alone judges
    return [judged(case, run, lambda: judge_mixed(run.get(), truth, case))]


def judge_mixed(run: list[Evidence], truth: Evidence, case: Case) -> Verdict:
    """Judge a run under mixed precision by fp32's bounds, or where it does not meet them by those of the low dtype.

    Where units are the blocks, models agree to the last bits. Other units cast what enters them at other places.
    """
    verdict = check_batches(run).add(check_initial(run, truth, case)).add(check_movement(run, truth, case))
    verdict.add(checks.check_precision(run, truth, case))
    strict = check_training(run, truth, case, "truth")
    low = replace(case, dtype=case.option("mixed_precision"))
    return verdict.add(strict if not strict.findings else check_training(run, truth, low, "truth"))


def cpu_offload(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Offloaded parameters and two micro-batches, of which the first is not reduced; clipped in every step."""
    case = engine.case(work, "cpu_offload", FSDP2, steps=2, micro_batches=2, max_norms=ALWAYS)
    return [trained(work, case.with_options(cpu_offload=True), "train:run")]


def idle_experts(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Batches of few words, so that experts get tokens on some ranks and none on others."""
    case = engine.case(work, "idle_experts", FSDP2, steps=3)
    cases = [case.with_options(few=few) for few in FEW]
    work.prepare(cases[:1])
    parameters = work.truth(cases[0]).facts["parameters"]
    if not any("expert" in name and len(facts["shape"]) == 3 for name, facts in parameters.items()):
        return [Outcome.not_applicable("this model type has no routed experts")]
    for chosen in cases:
        if checks.differs_between_ranks(work.truth(chosen)):
            return [trained(work, chosen, "train:run")]
    return [Outcome.not_applicable(f"every expert gets tokens on all ranks in {len(FEW)} choices of words")]


def repeated_saving(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Eight saves and loads in one process, alternately in the formats that the backend has."""
    case = replace(auto_case(engine, work, "repeated_saving"), scenario="repeat", steps=1)
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])
    formats = [name for name in FORMATS if name in engine.capabilities]
    arguments = {
        "case": case.to_json(),
        "checkpoint": str(work.checkpoint),
        "folder": str(work.fresh_folder("rounds")),
        "formats": formats * (8 // len(formats)),
    }
    run = work.job("extended_saving:repeat", arguments, case.layout, name=f"{work.spec.model_type} repeated saving")
    outcome = judged(case, run, lambda: checks.check_rounds(run.get()))
    if not run.failure:
        outcome.extra["rounds"] = run.get()[0].facts["rounds"]
    return [outcome]


def lone_save(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Rank 0 saves alone: the folder is right, or there is an error and nothing that looks complete."""
    case = replace(auto_case(engine, work, "lone_save"), scenario="lone", steps=1)
    work.prepare([auto_case(engine, work, "auto_vs_ddp")])
    folder = work.fresh_folder("lone")
    arguments = {"case": case.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)}
    run = work.job("extended_lone:save", arguments, case.layout, name=f"{work.spec.model_type} lone save")
    if run.failure:
        return [judged(case, run, Verdict.empty)]
    complete = any(folder.glob("*.safetensors")) and (folder / "config.json").exists()
    outcome = judged(case, run, lambda: checks.check_refusal(run.get(), complete))
    outcome.extra["lone"] = lone = run.get()[0].facts["lone"]
    if not lone["refused"]:
        outcome.verdict.add(reload(work, case, run, str(folder)))
    return [outcome]


def two_forwards(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Two forwards before each backward, with nested units and activation checkpointing: the gradients of both."""
    tree = work.truth(auto_case(engine, work, "two_forwards")).facts["tree"]
    plan = json.dumps(nested_plan(tree), sort_keys=True)
    case = engine.case(work, "two_forwards", FSDP2, plan=plan, steps=2, micro_batches=2, max_norms=ALWAYS)
    if work.truth(case).facts["recomputes"]:
        case = case.with_options(activation_checkpointing=True)
    return [trained(work, case, "extended_steps:together")]


def nested_plan(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the kit's manual plan with the attention of each block as a nested unit too: blocks enter it first."""
    plan = manual_plan(tree)
    for name in tree["modules"]:
        block, _, child = name.rpartition(".")
        held = any(parameter.startswith(f"{name}.") for parameter in tree["parameters"])
        attends = "attn" in child or "attention" in child
        if block in tree["blocks"] and held and attends and "norm" not in child:
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            plan["modules"][pattern] = {"reshard_after_forward": True}
    return plan


def nonfinite_guard(engine: Engine, work: SpecWork) -> list[Outcome]:
    """A gradient that is not finite on one rank: every rank refuses the step."""
    case = auto_case(engine, work, "nonfinite_guard").with_options(refuse_nonfinite=True)
    run = watched(work, case, "extended_steps:guard")
    return [judged(case, run, lambda: check_guard(run.get()))]


EXTENDED: dict[str, Callable[[Engine, SpecWork], list[Outcome]]] = {
    "accumulation": accumulation,
    "mesh_shapes": mesh_shapes,
    "adapters": adapters,
    "checkpointing": checkpointing,
    "evaluation": evaluation,
    "mixed_precision": mixed_precision,
    "cpu_offload": cpu_offload,
    "idle_experts": idle_experts,
    "repeated_saving": repeated_saving,
    "lone_save": lone_save,
    "two_forwards": two_forwards,
    "nonfinite_guard": nonfinite_guard,
}


def dropout_case(engine: Engine, work: SpecWork, test: str) -> Case:
    """Return the case that `checkpointing` and `evaluation` share with their truth."""
    return engine.case(work, test, FSDP2, steps=3).with_options(evaluate=True)


def watched(work: SpecWork, case: Case, target: str = "extended:run") -> Run:
    """Return the run of a case, from the cache where it was done."""
    return work.cached(target, case, {"checkpoint": str(work.checkpoint)})


def trained(work: SpecWork, case: Case, target: str = "extended:run") -> Outcome:
    """Train and judge by truth and DDP, once more in fp64 where a number is in doubt."""
    work.expect_ddp(case)
    run = watched(work, case, target)
    if run.failure:
        return judged(case, run, Verdict.empty)
    truth, ddp = work.truth(case), work.ddp(case)
    # routing is the core tier's business: a few steps need not reach all experts
    outcome = judged(case, run, lambda: judge_training(run.get(), ddp, truth, case, routed=False))

    again = partial(doubted_again, work, outcome.verdict, partial(watched, work, target=target))
    settle(outcome, work, case, again)
    look_closer(outcome, work, case, run.get(), truth)
    return outcome


def reload(work: SpecWork, case: Case, saved: Run, folder: str) -> Verdict:
    """Judge a saved folder by loading it in one process with plain transformers."""
    single = Layout(kind="single")
    arguments = {"case": case.to_json(), "folder": folder}
    plain = work.job("saving:plain", arguments, single, name=f"{work.spec.model_type} plain reload")
    full = trained_weights(saved.get(), case.layout)
    how = "with plain from_pretrained"
    return judged(
        case, plain, lambda: check_loading_info(plain.get()[0]).add(check_reload(plain.get(), full, single, how))
    ).verdict
