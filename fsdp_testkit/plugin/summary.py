"""The end of a session: the matrix in the terminal, the report, and the refusal of a session that checked nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from fsdp_testkit.core.result import Result
from fsdp_testkit.plugin.lifetime import CLOSING, SESSION
from fsdp_testkit.plugin.options import RUN_OPTIONS, RunOptions, is_worker
from fsdp_testkit.plugin.rows import STORE
from fsdp_testkit.reporting.counts import count, fallen, read_counts, vanished
from fsdp_testkit.reporting.matrix import matrix_lines, total_lines
from fsdp_testkit.reporting.report import report_document, write_report


@dataclass(slots=True)
class Ending:
    """What is to be said at the end, beside the matrix."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


ENDING = pytest.StashKey[Ending]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge the session as a whole and write the report."""
    config = session.config
    if is_worker(config) or STORE not in config.stash or config.getoption("collectonly", default=False):
        return
    rows = config.stash[STORE].rows()
    options = config.stash[RUN_OPTIONS]
    ending = Ending(errors=[*config.stash[CLOSING]])
    # a session that broke off says so itself
    complete = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if complete and (problem := silence(rows, options)):
        ending.errors.append(problem)
    if complete and rows:
        ending.errors.extend(config.stash[SESSION].ledger.stale(rows, _everything(options)))
    # with other seeds a router may send tokens elsewhere, and with a fault anything may happen
    if complete and rows and options.counts is not None and not options.engine.fault and not options.engine.seed:
        recorded = read_counts(options.counts)
        ending.errors.extend(fallen(count(rows), recorded))
        if _everything(options) is not None and _whole(config):
            ending.errors.extend(vanished(rows, recorded))
    if options.report is not None and (rows or complete):
        try:
            write_report(options.report, report_document(rows, options.to_dict()))
            ending.notes.append(f"report: {options.report}")
        except OSError as error:
            ending.errors.append(
                f"--fsdp-report={str(options.report)!r} could not be written: {error.strerror or error}; "
                "what was there before is unchanged"
            )
    config.stash[ENDING] = ending
    if ending.errors and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the matrix; with -q its totals only."""
    if (ending := config.stash.get(ENDING, None)) is None:
        return
    rows = config.stash[STORE].rows()
    if rows and config.get_verbosity() > -2:
        from fsdp_testkit.engine.catalogue_of_tests import TESTS

        quiet = config.get_verbosity() < 0
        lines = (
            total_lines(rows) if quiet else matrix_lines(rows, order=list(TESTS), verbose=config.get_verbosity() > 0)
        )
        terminalreporter.section("fsdp_testkit", sep="=")
        for line in lines:
            for segment in line:
                markup = {segment.colour: True} if segment.colour else {}
                terminalreporter.write(segment.text, **markup)
            terminalreporter.line("")
    for note in ending.notes:
        terminalreporter.line(note)
    for error in ending.errors:
        terminalreporter.line(f"ERROR fsdp_testkit: {error}", red=True)


def silence(rows: list[Result], options: RunOptions) -> str:
    """Return what is wrong with a session that judged nothing, ``""`` where it judged something.

    Sessions without FSDP items are none of the kit's business, unless FSDP results were asked for.
    """
    if not rows:
        asked = [
            name
            for name, value in (("--fsdp-models", options.models), ("--fsdp-report", options.report))
            if value is not None
        ]
        return f"no FSDP test was run, although {' and '.join(asked)} asked for results" if asked else ""
    if any(row.checks for row in rows) or any(row.outcome == "error" for row in rows):
        return ""
    reasons = "; ".join(list(dict.fromkeys(row.reason for row in rows if row.reason))[:3])
    return f"not a single check was run in {len(rows)} rows: {reasons or 'no row gives a reason'}"


def _whole(config: pytest.Config) -> bool:
    """Return whether nothing was left out of what was collected."""
    left_out = ("keyword", "markexpr", "deselect", "fsdp_shard", "lf")
    return not any(config.getoption(name, default=None) for name in left_out) and not any(
        "::" in a for a in config.args
    )


def _everything(options: RunOptions) -> tuple[str, ...] | None:
    """Return all model types where the run selected all of them, else ``None``."""
    from fsdp_testkit.models.catalogue import causal_lm_types

    known = causal_lm_types()
    return known if options.models is not None and set(known) <= set(options.models) else None
