"""One procedure per test: which cases are run and which checks judge them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fsdp_testkit.checks.buffers import check_buffers, check_dtypes
from fsdp_testkit.checks.meta import check_meta_init
from fsdp_testkit.checks.resume import check_resume
from fsdp_testkit.checks.saving import (
    check_buffers_kept,
    check_files,
    check_loading_info,
    check_reload,
    check_traffic,
    check_trained,
    trained_weights,
)
from fsdp_testkit.checks.sensitivity import spread
from fsdp_testkit.checks.structure import check_structure
from fsdp_testkit.checks.tolerances import NUDGES
from fsdp_testkit.checks.training import check_initial, check_routing, check_training
from fsdp_testkit.core.case import Case
from fsdp_testkit.core.evidence import Evidence, TensorData
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.explain import look_closer
from fsdp_testkit.engine.jobs import Order
from fsdp_testkit.engine.judge import (
    amplified,
    decide_rounding,
    in_doubt,
    judge_oracles,
    judge_training,
    leave_undecided,
    needs_fp64,
)
from fsdp_testkit.engine.outcome import Outcome, judged
from fsdp_testkit.engine.work import OracleFailedError, Run, SpecWork
from fsdp_testkit.models.expectations import UNREPEATABLE_DROPOUT

if TYPE_CHECKING:
    from fsdp_testkit.engine.engine import Engine

FSDP2 = Layout(kind="fsdp", shard=2)
HSDP = Layout(kind="hsdp", replicate=2, shard=2)
#: Structure at sizes that the machine need not have, under a fake process group: layout -> claimed ranks.
CLAIMED: dict[Layout, tuple[int, ...]] = {
    Layout(kind="fsdp", shard=3, comm="fake"): (0, 1, 2),
    Layout(kind="fsdp", shard=8, comm="fake"): (7,),
    Layout(kind="hsdp", replicate=2, shard=4, comm="fake"): (7,),
}
#: Clipping is really active in the last of five steps (asserted), and measured only in the others.
MAX_NORMS = (0.0, 0.0, 0.0, 0.0, 0.02)
#: Seeds that are tried until the data of every rank reaches all experts.
SEEDS = 8


def sharding_structure(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Structure on two real ranks, and claimed at 3, 8 and 2 x 4 under a fake group."""
    cases = prepare(engine, work)
    if same := ignored_tie(work, cases[0]):
        return [same]
    tree = work.truth(cases[0]).facts["tree"]
    case = replace(cases[0], options=()).with_options(test="sharding_structure")
    run = work.train(case)
    outcomes = [judged(case, run, lambda: check_structure(run.get(), tree, case.layout))]
    if "fake" not in engine.capabilities:
        reason = f"backend {case.backend} cannot load under a fake process group"
        return [*outcomes, *(replace_layout(Outcome.not_applicable(reason), layout) for layout in CLAIMED)]
    claims = [
        (replace(case, layout=layout, scenario="structure"), rank)
        for layout, ranks in CLAIMED.items()
        for rank in ranks
    ]
    together = claim(work, claims)
    for layout in CLAIMED:
        mine = [index for index, (claimed, _) in enumerate(claims) if claimed.layout == layout]
        # a layout must not fail for another one's failure
        run = claim(work, [claims[index] for index in mine]) if together.failure else together
        places = range(len(mine)) if together.failure else mine
        found = [] if run.failure else [run.get(f"claim{index}")[0] for index in places]
        outcomes.append(judged(claims[mine[0]][0], run, partial(check_structure, found, tree, layout)))
    return outcomes


def claim(work: SpecWork, claims: list[tuple[Case, int]]) -> Run:
    """Run a lone process that claims to be one rank after the other; evidence ``claim0``, ``claim1``, ..."""
    return work.job(
        "structure:run",
        {"claims": [[case.to_json(), rank] for case, rank in claims], "checkpoint": str(work.checkpoint)},
        Layout(kind="single"),
        name=f"{work.spec.model_type} claimed structure",
    )


def buffers_dtypes(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Buffers and dtypes after a load in fp32 and in bf16."""
    cases = prepare(engine, work)
    case = auto_case(engine, work, "buffers_dtypes")
    half = replace(case, dtype="bfloat16", steps=0).with_options(poison="garbage")
    truth, truth_half = work.truth(cases[0]), work.truth(half)
    run = work.train(case)
    outcome = judged(case, run, lambda: check_buffers(run.get(), truth).add(check_dtypes(run.get(), truth)))
    run_half = work.train(half, follows=True)
    outcome_half = judged(
        half,
        run_half,
        lambda: (
            check_buffers(run_half.get(), truth_half)
            .add(check_dtypes(run_half.get(), truth_half))
            .add(check_initial(run_half.get(), truth_half, half))
        ),
    )
    outcome.verdict.add(outcome_half.verdict)
    if outcome_half.verdict.findings and not outcome.case:
        outcome.case = half
    outcome.extra |= outcome_half.extra
    return [outcome]


def auto_vs_ddp(engine: Engine, work: SpecWork) -> list[Outcome]:
    """The automatic plan on two ranks."""
    return training(engine, work, auto_case(engine, work, "auto_vs_ddp"))


def manual_vs_ddp(engine: Engine, work: SpecWork) -> list[Outcome]:
    """A manual plan with mixed options, nested units and frozen parameters, on two ranks."""
    outcomes = training(engine, work, manual_case(engine, work))
    case = manual_case(engine, work)
    run = work.train(case)
    if not run.failure and not outcomes[0].outcome:
        truth = work.truth(case)
        tree = copy.deepcopy(truth.facts["tree"])  # taken before the case froze anything
        for name in frozen_names(truth):
            tree["parameters"][name]["requires_grad"] = False
        outcomes[0].verdict.add(check_structure(run.get(), tree, case.layout))
    return outcomes


def hsdp_vs_ddp(engine: Engine, work: SpecWork) -> list[Outcome]:
    """The automatic plan on a 2 x 2 mesh."""
    outcomes = training(engine, work, hsdp_case(engine, work))
    case = hsdp_case(engine, work)
    run = work.train(case)
    if not run.failure and not outcomes[0].outcome:
        outcomes[0].verdict.add(check_structure(run.get(), work.truth(case).facts["tree"], case.layout))
    return outcomes


def save_load(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Train, save as safetensors, open the files, load on 2 ranks, 3 ranks and with plain transformers."""
    cases = prepare(engine, work)
    if same := ignored_tie(work, cases[0]):
        return [same]
    case = replace(auto_case(engine, work, "save_load"), scenario="save").with_options(format="safetensors")
    folder = work.fresh_folder("saved")
    saved = work.job(
        "saving:save",
        {"case": case.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)},
        case.layout,
        name=f"{work.spec.model_type} save",
    )
    if saved.failure:
        return [judged(case, saved, Verdict.empty)]
    full = trained_weights(saved.get(), case.layout)
    tied = is_tied(work.truth(cases[0]))
    outcome = judged(case, saved, lambda: check_trained(saved.get()).add(check_traffic(saved.get())))
    # the checkpoint is what a single-process save_pretrained writes for this model; judged before anybody loads
    outcome.verdict.add(check_files(folder, work.checkpoint, tied))
    single = Layout(kind="single")
    layouts = (["fsdp(2)"], ["fsdp(3)"])
    plain, *elsewhere = work.run(
        [
            work.order(
                "saving:plain",
                {"case": case.to_json(), "folder": str(folder)},
                single,
                name=f"{work.spec.model_type} plain reload",
            ),
            *(load_order(work, case, folder, places) for places in layouts),
        ]
    )
    outcome.verdict.add(
        judged(
            case,
            plain,
            lambda: (
                check_loading_info(plain.get()[0])
                .add(check_reload(plain.get(), full, single, "with plain from_pretrained"))
                .add(check_buffers_kept(saved.get()[0], plain.get(), "with plain from_pretrained"))
            ),
        ).verdict
    )
    for places, run in zip(layouts, elsewhere, strict=True):
        outcome.verdict.add(judge_load(case, saved, full, places, run))
    look_closer(outcome, work, case, saved.get(), work.truth(cases[0]))
    return [outcome]


def dcp(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Save a DCP folder on 2 ranks, load it on 1, 2 and 4 ranks and on 2 x 2."""
    prepare(engine, work)
    case = replace(auto_case(engine, work, "dcp"), scenario="save").with_options(format="dcp")
    folder = work.fresh_folder("dcp")
    saved = work.job(
        "saving:save",
        {"case": case.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)},
        case.layout,
        name=f"{work.spec.model_type} dcp save",
    )
    if saved.failure:
        return [judged(case, saved, Verdict.empty)]
    full = trained_weights(saved.get(), case.layout)
    outcome = judged(case, saved, lambda: check_trained(saved.get()).add(check_traffic(saved.get())))
    layouts = (["fsdp(1)"], ["fsdp(2)"], ["fsdp(4)", "hsdp(2, 2)"])
    runs = work.run([load_order(work, case, folder, places) for places in layouts])
    for places, run in zip(layouts, runs, strict=True):
        outcome.verdict.add(judge_load(case, saved, full, places, run))
    return [outcome]


def resume(engine: Engine, work: SpecWork) -> list[Outcome]:
    """Half the steps, save, fresh processes, scrambled generators, go on; dropout on."""
    if reason := UNREPEATABLE_DROPOUT.get(work.spec.model_type):
        return [Outcome.not_applicable(f"no run of {work.spec.model_type} can be repeated: {reason}")]
    work = engine.work(replace(work.spec, dropout=0.2))  # dropout is part of the checkpoint's config
    case = replace(auto_case(engine, work, "resume"), scenario="resume", steps=6)
    truth = work.truth(case)
    folder = work.fresh_folder("resume")
    whole = work.job(
        "resume:uninterrupted",
        {"case": case.to_json(), "checkpoint": str(work.checkpoint), "folder": str(folder)},
        case.layout,
        name=f"{work.spec.model_type} uninterrupted",
    )
    if whole.failure:
        return [judged(case, whole, Verdict.empty)]
    again = work.job(
        "resume:resumed",
        {"case": case.to_json(), "folder": str(folder)},
        case.layout,
        name=f"{work.spec.model_type} resumed",
        follows=True,
    )
    first = case.steps // 2
    outcome = judged(case, again, lambda: check_resume(whole.get(), again.get(), case, first))
    # the uninterrupted run is only worth resuming if it is right: each rank's own dropout masks included
    outcome.verdict.add(check_training(whole.get(), truth, case, "truth"))

    def exact_verdict(exact: Case) -> Verdict | str:
        run = work.train(replace(exact, scenario="train"))
        return run.failure or check_training(run.get(), work.truth(exact), exact, "truth")

    settle(outcome, work, case, exact_verdict)
    look_closer(outcome, work, case, whole.get(), truth)
    return [outcome]


def meta_init(engine: Engine, work: SpecWork) -> list[Outcome]:
    """What a load reads, allocates and initialises, on two ranks and on a 2 x 2 mesh; its values against truth."""
    cases = prepare(engine, work)
    truth = work.truth(cases[0])
    case = replace(auto_case(engine, work, "meta_init"), scenario="meta", steps=0).with_options(poison="garbage")
    run = work.cached("meta:run", case, {"checkpoint": str(work.checkpoint)})
    outcome = judged(
        case,
        run,
        lambda: (
            check_meta_init(run.get(), case.layout, case.backend)
            .add(check_initial(run.get(), truth, case))
            .add(check_buffers(run.get(), truth))
        ),
    )
    if not run.failure:
        outcome.extra["load"] = [evidence.facts["load"] for evidence in run.get()]
    if "hsdp" in engine.capabilities and not outcome.verdict.findings:
        twice = replace(case, layout=hsdp_case(engine, work).layout)
        again = work.cached("meta:run", twice, {"checkpoint": str(work.checkpoint)})
        found = judged(twice, again, lambda: check_meta_init(again.get(), twice.layout, twice.backend))
        outcome.verdict.add(found.verdict)
        if not again.failure:
            outcome.extra["hsdp_load"] = [evidence.facts["load"] for evidence in again.get()]
    return [outcome]


PROCEDURES: dict[str, Callable[[Engine, SpecWork], list[Outcome]]] = {
    "sharding_structure": sharding_structure,
    "buffers_dtypes": buffers_dtypes,
    "auto_vs_ddp": auto_vs_ddp,
    "manual_vs_ddp": manual_vs_ddp,
    "hsdp_vs_ddp": hsdp_vs_ddp,
    "save_load": save_load,
    "dcp": dcp,
    "resume": resume,
    "meta_init": meta_init,
}


def auto_case(engine: Engine, work: SpecWork, test: str) -> Case:
    """Return the training case that structure, buffers and auto_vs_ddp share."""
    return engine.case(work, test, FSDP2, max_norms=MAX_NORMS)


def manual_case(engine: Engine, work: SpecWork) -> Case:
    """Return the case of the manual plan."""
    return engine.case(work, "manual_vs_ddp", FSDP2, plan="manual", freeze=True, max_norms=MAX_NORMS)


def hsdp_case(engine: Engine, work: SpecWork) -> Case:
    """Return the case of the 2 x 2 mesh."""
    return engine.case(work, "hsdp_vs_ddp", HSDP, max_norms=MAX_NORMS)


def prepare(engine: Engine, work: SpecWork) -> list[Case]:
    """Compute the truth of all training cases in one process; return them, the auto case first.

    A case in which some rank's data never reaches an expert would say nothing about that expert there: with weights of
    another seed it does, and up to `SEEDS` are tried. Cases that were made before have to take the seed of ``work``.
    """
    for number in range(SEEDS):
        cases = [auto_case(engine, work, "auto_vs_ddp")]
        if work.spec.tie is not None:
            cases += [manual_case(engine, work), hsdp_case(engine, work)]
        work.prepare(cases)
        weak = not work.settled and any(check_routing(work.truth(case)).findings for case in cases)
        if not weak or number == SEEDS - 1:
            break
        work.reseed()
    work.settled = True
    return cases


def training(engine: Engine, work: SpecWork, case: Case) -> list[Outcome]:
    """Judge a training case, once more in fp64 where a number is in doubt."""
    cases = prepare(engine, work)
    if same := ignored_tie(work, cases[0]):
        return [same]
    case = replace(case, seed=work.seed)
    work.expect_ddp(case)
    run = work.train(case)
    if run.failure:
        return [judged(case, run, Verdict.empty)]
    truth, ddp = work.truth(case), work.ddp(case)
    outcome = judged(case, run, lambda: judge_training(run.get(), ddp, truth, case))

    settle(outcome, work, case, partial(doubted_again, work, outcome.verdict, work.train))
    look_closer(outcome, work, case, run.get(), truth)
    return [outcome]


def doubted_again(work: SpecWork, verdict: Verdict, train: Callable[[Case], Run], exact: Case) -> Verdict | str:
    """Return the fp64 verdict over what is in doubt in ``verdict``, or why the code under test did not get so far.

    Args:
        work: the model's.
        verdict: of the case in its own dtype.
        train: runs the code under test.
        exact: the case in fp64.
    """
    found = Verdict.empty()
    of_ddp, of_run = in_doubt(verdict)
    if of_ddp and of_run:
        work.expect_ddp(exact)
    if of_run:
        again = train(exact)
        if again.failure:
            return again.failure
        found.add(check_training(again.get(), work.truth(exact), exact, "truth"))
    if of_ddp:
        found.add(judge_oracles(work.ddp(exact), work.truth(exact), exact))
    return found


def settle(outcome: Outcome, work: SpecWork, case: Case, exact_verdict: Callable[[Case], Verdict | str]) -> None:
    """Where a number is in doubt, judge the case once more in fp64 and say whether it was rounding or logic.

    Rounding that is larger than the arithmetic explains, and what fp64 cannot decide since truth itself does not run in
    it (the model casts to fp32 by itself), is held against what rounding does to truth. ``exact_verdict`` returns the
    verdict, or why the code under test did not get so far: where truth does, the findings stand.
    """
    if not needs_fp64(outcome.verdict, case):
        return
    exact = replace(case, dtype="float64")
    harmless = []
    try:
        work.truth(exact)
        found = exact_verdict(exact)
    except OracleFailedError as error:
        outcome.extra["no_fp64"] = str(error).partition("\n")[0]
        leave_undecided(outcome.verdict, case)
    else:
        if isinstance(found, str):
            outcome.extra["fp64_failure"] = found
            return
        harmless = decide_rounding(outcome.verdict, found, case)
    if any(finding.nature in ("rounding", "undecided") for finding in outcome.verdict.findings):
        nudged = [case.with_options(nudge=number + 1) for number in range(NUDGES)]
        work.prepare(nudged)
        harmless += amplified(outcome.verdict, spread(work.truth(case), [work.truth(other) for other in nudged]))
    if harmless:
        outcome.extra["rounding"] = [finding.to_dict() for finding in harmless[:5]]


def load_order(work: SpecWork, case: Case, folder: Path, layouts: list[str]) -> Order:
    """Return the load of a saved folder under layouts of one world size, in processes that did not save it."""
    first = Layout.parse(layouts[0], device=case.layout.device, comm=case.layout.comm)
    return work.order(
        "saving:load",
        {"case": case.to_json(), "folder": str(folder), "layouts": layouts},
        first,
        name=f"{work.spec.model_type} load at {' and '.join(layouts)}",
        follows=True,
    )


def judge_load(case: Case, saved: Run, full: dict[str, TensorData], layouts: list[str], run: Run) -> Verdict:
    """Judge weights and buffers of a load of `load_order`."""
    if run.failure:
        return judged(case, run, Verdict.empty).verdict
    verdict = Verdict.empty()
    for index, text in enumerate(layouts):
        loaded = run.get(f"load{index}")
        verdict.add(check_reload(loaded, full, Layout.parse(text), f"at {text}"))
        verdict.add(check_buffers_kept(saved.get()[0], loaded, f"at {text}"))
    return verdict


def ignored_tie(work: SpecWork, case: Case) -> Outcome | None:
    """Return an outcome where the model ignores ``tie_word_embeddings=True``: it runs once, as untied."""
    if work.spec.tie is True and not is_tied(work.truth(case)):
        return Outcome.not_applicable("this model type ignores tie_word_embeddings=True: the same as untied")
    return None


def is_tied(truth: Evidence) -> bool:
    """Whether truth's model has parameters that are one object under several names."""
    return any(facts["aliases"] for facts in truth.facts["parameters"].values())


def frozen_names(truth: Evidence) -> list[str]:
    """Return the parameters that the case froze."""
    return [name for name, facts in truth.facts["parameters"].items() if not facts["requires_grad"]]


def replace_layout(outcome: Outcome, layout: Layout) -> Outcome:
    """Return the outcome with a layout's name."""
    outcome.layout = str(layout)
    return outcome
