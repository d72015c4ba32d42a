"""``python -m fsdp_testkit``: replay a case, list things, merge and compare reports, run the museum, look around.

Exit status: 0 all well, 1 a replayed case failed, a bug was not caught or the installation lacks something,
2 impossible input.
"""

# ruff: noqa: T201 - a command's output is what it prints

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fsdp_testkit.core.case import Case
from fsdp_testkit.core.errors import EnvironmentLacksError, KitError, UsageError
from fsdp_testkit.core.result import BAD_OUTCOMES, Result
from fsdp_testkit.core.versions import KIT_VERSION, check_supported, installed_version
from fsdp_testkit.ranks.command import add_agent_arguments, run_agent
from fsdp_testkit.reporting.failure import failure_text, number, title
from fsdp_testkit.reporting.report import check_target, gpus, merge_reports, read_report, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except BrokenPipeError:  # `list | head`: the rest is not wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EnvironmentLacksError as error:
        print(f"fsdp_testkit: {error}", file=sys.stderr)
        return 1
    except (KitError, OSError) as error:
        print(f"fsdp_testkit: {error}", file=sys.stderr)
        return 2


def replay(arguments: argparse.Namespace) -> int:
    """Run one case again and print its findings."""
    from fsdp_testkit.models.own_code import check_code
    from fsdp_testkit.plugin.options import check_backend, deadline, load_class

    text = Path(arguments.case[1:]).read_text("utf-8") if arguments.case.startswith("@") else arguments.case
    try:
        case = Case.from_json(text)
    except TypeError as error:
        raise UsageError(f"case={text[:80]!r} has a value of the wrong type: {error}") from None
    check_backend("case: backend", case.backend)
    if case.fault:
        load_class("case: fault", case.fault)
    if case.model.code:
        check_code("case: code", case.model.code, trusted=arguments.trust_remote_code, option="--trust-remote-code")
    limit = deadline("--deadline", arguments.deadline)
    if not os.environ.get("FSDP_TESTKIT_ANY_VERSION"):
        check_supported()
    from fsdp_testkit.engine.engine import Engine, Settings

    device = case.layout.device
    engine = Engine(
        Settings(
            backend=case.backend,
            device=device,
            start_method="spawn" if device == "cuda" else "forkserver",
            seed=case.seed,
            deadline=limit,
            fault=case.fault,
            trust_remote_code=arguments.trust_remote_code,
        )
    )
    try:
        rows = engine.run_case(case)
    finally:
        engine.close()
    for row in rows:
        print(_line(row))
    if bad := [row for row in rows if row.outcome in BAD_OUTCOMES]:
        # who replays wants to see everything
        print(f"\n{failure_text(bad, shown=arguments.findings)}")
    if not rows:
        print("fsdp_testkit: the case gave no result")
    return 1 if bad or not rows else 0


def list_things(arguments: argparse.Namespace) -> int:
    """Print models, tests and backends."""
    from fsdp_testkit.engine.catalogue_of_tests import TESTS
    from fsdp_testkit.models.catalogue import HEADLINE, IMPOSSIBLE, causal_lm_types
    from fsdp_testkit.plugin.options import BACKENDS

    what = arguments.what
    if what in ("models", "all"):
        types = causal_lm_types()
        print(f"models ({len(types)}; * in --fsdp-models headline):")
        for name in types:
            note = f"  impossible: {IMPOSSIBLE[name]}" if name in IMPOSSIBLE else ""
            print(f"  {'*' if name in HEADLINE else ' '} {name}{note}")
    if what in ("tests", "all"):
        print(f"tests ({len(TESTS)}):")
        for info in TESTS.values():
            print(f"    {info.name:<20} {', '.join(info.variants):<14} {info.summary}")
    if what in ("backends", "all"):
        print("backends:")
        for name in (*BACKENDS, "package.module:Class"):
            print(f"    {name}")
    return 0


def tiny(arguments: argparse.Namespace) -> int:
    """Print the tiny config that the kit tests a model type with."""
    from fsdp_testkit.models.catalogue import IMPOSSIBLE
    from fsdp_testkit.plugin.source import check_model_type

    check_model_type("MODEL", arguments.model)
    if reason := IMPOSSIBLE.get(arguments.model):
        raise UsageError(f"{arguments.model} has no tiny config: {reason}")
    from fsdp_testkit.models.tiny import tiny_config

    tie = {"untied": False, "tied": True, "default": None}[arguments.variant]
    config = tiny_config(arguments.model, tie=tie).to_dict()
    print(json.dumps(config, indent=1, sort_keys=True, default=str))
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write one report over several."""
    check_target(arguments.output)
    documents = [read_report(path) for path in arguments.reports]
    merged = merge_reports(documents)
    write_report(arguments.output, merged)
    given = sum(len(document["results"]) for document in documents)
    replaced = given - len(merged["results"])
    print(f"{arguments.output}: {len(merged['results'])} rows, {replaced} replaced by a later report")
    return 0


def counts(arguments: argparse.Namespace) -> int:
    """Write how many checks each test of a report has made."""
    from fsdp_testkit.reporting.counts import count, text_of

    check_target(arguments.output)
    rows = [Result(**raw) for path in arguments.reports for raw in read_report(path)["results"]]
    found = count(rows)
    if not found:
        raise UsageError("no test of the reports has passed: there is nothing to count")
    arguments.output.write_text(text_of(found), encoding="utf-8")
    tests = sum(len(kept) for models in found.values() for kept in models.values())
    print(f"{arguments.output}: {tests} tests of {sum(len(models) for models in found.values())} models")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Print what changed between two reports."""
    from fsdp_testkit.reporting.difference import difference_lines

    before, after = read_report(arguments.before), read_report(arguments.after)
    print("\n".join(difference_lines(before, after)))
    return 0


def museum(arguments: argparse.Namespace) -> int:
    """List or run the museum of publicly reported bugs; print the score table."""
    from fsdp_testkit.faults.score import document, run_scores, select, unscored
    from fsdp_testkit.reporting.museum import score_line, score_lines

    entries = select(arguments.id, arguments.family)
    if arguments.json is not None:
        check_target(arguments.json)
    started = time.monotonic()
    if arguments.run_faults:
        scores = run_scores(
            entries,
            jobs=arguments.jobs,
            report=lambda score: print(score_line(score.to_dict()), file=sys.stderr, flush=True),
        )
    else:
        scores = [unscored(entry) for entry in entries]
    written = document(scores, jobs=arguments.jobs, seconds=time.monotonic() - started)
    print("\n".join(score_lines(written["faults"], ran=arguments.run_faults)))
    if arguments.json is not None:
        write_report(arguments.json, written)
    return 1 if arguments.run_faults and not all(score.caught or not score.real for score in scores) else 0


def doctor(_: argparse.Namespace) -> int:
    """Print what a bug report needs, and whether this installation can run the kit."""
    print(f"fsdp_testkit {KIT_VERSION}, python {sys.version.split()[0]}, {os.cpu_count()} cpus")
    for name in ("torch", "transformers", "numpy", "safetensors", "pytest", "pytest-xdist"):
        print(f"  {name:<14} {installed_version(name) or 'not installed'}")
    print(f"  GPUs           {', '.join(gpus()) or 'none that the driver lists'}")
    check_supported()
    print("torch and transformers are versions that the kit was run with")
    from fsdp_testkit.ranks.doctor import examine

    looks = examine()
    for look in looks:
        print(f"  {look.name:<22} {look.found}")
        if look.advice:
            print(f"  {'':<22} -> {look.advice}")
    return 1 if any(look.fatal for look in looks) else 0


def _line(row: Result) -> str:
    error = "" if row.max_rel_error is None else f", largest relative error {number(row.max_rel_error)}"
    reason = f": {row.reason}" if row.reason and row.outcome not in BAD_OUTCOMES else ""
    return (
        f"{title(row)} on {row.layout} with backend {row.backend}: {row.outcome}{reason} "
        f"({row.checks} checks, {row.tensors} tensors{error}, {row.seconds:.1f} s)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_testkit", description="Distributed correctness tests for FSDP2 training."
    )
    parser.add_argument("--version", action="version", version=f"fsdp_testkit {KIT_VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("replay", help="run one case again, as printed with a failure")
    command.add_argument("case", help="the case's JSON, or @FILE that holds it")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of the folder that the case names, if it does"
    )
    command.add_argument("--deadline", default="60", metavar="SECONDS", help="time limit of one job (60)")
    command.add_argument("--findings", type=int, default=50, metavar="N", help="findings to print (50)")
    command.set_defaults(run=replay)

    command = commands.add_parser("list", help="models, tests and backends")
    command.add_argument("what", nargs="?", choices=("models", "tests", "backends", "all"), default="all")
    command.set_defaults(run=list_things)

    command = commands.add_parser("tiny", help="print the tiny config of a model type")
    command.add_argument("model")
    command.add_argument("--variant", choices=("default", "untied", "tied"), default="default")
    command.set_defaults(run=tiny)

    command = commands.add_parser("merge", help="merge JSON reports; a later one wins")
    command.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    command.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.json")
    command.set_defaults(run=merge)

    command = commands.add_parser("compare", help="print what changed between two reports, as Markdown")
    command.add_argument("before", type=Path, metavar="BEFORE.json")
    command.add_argument("after", type=Path, metavar="AFTER.json")
    command.set_defaults(run=compare)

    command = commands.add_parser("counts", help="write how many checks each test of a report has made")
    command.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    command.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.json")
    command.set_defaults(run=counts)

    command = commands.add_parser("museum", help="list or run publicly reported bugs, re-created as faults")
    command.add_argument("--id", action="append", default=[], metavar="BUG", help="only this one; may be repeated")
    command.add_argument(
        "--family",
        action="append",
        default=[],
        metavar="NAME",
        help="only this family (number or name); may be repeated",
    )
    command.add_argument("--run", action="store_true", dest="run_faults", help="run them; without it they are listed")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that run them (1)")
    command.add_argument("--json", type=Path, metavar="FILE.json", help="write the scores there")
    command.set_defaults(run=museum)

    command = commands.add_parser("ranks", help="wait for a pytest --fsdp-hosts and start its ranks on this machine")
    add_agent_arguments(command)
    command.set_defaults(run=run_agent)

    command = commands.add_parser("doctor", help="versions, hardware, limits and a trial run, for bug reports")
    command.set_defaults(run=doctor)
    return parser
