"""What transformers' own FSDP tests and this kit say about the same faults.

python -m benchmarks.against_upstream --sdist FOLDER [--only FAULT] [--limit 120] [--json FILE]

``FOLDER`` holds a source distribution of the installed transformers (the wheel has no tests):

    pip download --no-binary :all: --no-deps transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz

Each fault is put into torch or transformers, in the ranks of upstream's tests that come near it, and in those of the
kit with ``--fsdp-backend transformers``: the same implementation under two judges. Both first have to be green
without a fault.
Prints fault | upstream: outcome, seconds | kit: outcome, seconds, check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.upstream_faults import FAULTS, Upstream
from fsdp_testkit.core.case import ModelSpec
from fsdp_testkit.core.result import Result
from fsdp_testkit.core.versions import installed_version
from fsdp_testkit.engine.engine import Engine, Settings

#: Upstream's tests that are run, with the label of the variant that llama has.
LABELS = {"test_fsdp2_sharding_structure": "untied", "test_fsdp2_plan_vs_ddp": "untied"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one side said: ``caught``, ``missed``, ``hangs``, ``green``, ``red``, ``skipped``; its words; seconds."""

    outcome: str
    words: str
    seconds: float
    hits: int = 0


def upstream(file: Path, test: str, fault: str, limit: float) -> Outcome:
    """Run one upstream test in processes of its own, which are ended after ``limit`` seconds."""
    command = [sys.executable, "-m", "benchmarks.upstream_tests", str(file), test, LABELS.get(test, ""), fault]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=limit)
        hung = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        hung = True
    seconds = time.monotonic() - started
    hits = sum(int(count) for count in re.findall(r"^hits on rank \d+: (\d+)$", text, re.MULTILINE))
    if hung:
        return Outcome(outcome="hangs", words=f"nothing said for {limit:.0f} s", seconds=seconds, hits=hits)
    if "skipped: " in text:
        return Outcome(outcome="skipped", words=text.split("skipped: ")[-1].strip(), seconds=seconds)
    if process.returncode == 0:
        return Outcome(outcome="missed" if fault else "green", words=f"{test} passes", seconds=seconds, hits=hits)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("hits on rank", "[FSDP]"))]
    words = next((line for line in lines if "rror" in line or "Failed" in line), lines[-1] if lines else "no output")
    return Outcome(outcome="caught" if fault else "red", words=f"{test}: {words[:160]}", seconds=seconds, hits=hits)


def kit(engine: Engine, test: str, variant: str, fault: type[Upstream] | None) -> Outcome:
    """Run one test of the kit on transformers' implementation."""
    used = engine if fault is None else engine.armed(f"{fault.__module__}:{fault.__qualname__}")
    started = time.monotonic()
    rows = used.run_test(ModelSpec(model_type="llama"), test, variant)
    seconds = time.monotonic() - started
    if fault is None:
        bad = [row for row in rows if row.outcome not in ("passed", "not_applicable")]
        return Outcome(outcome="red" if bad else "green", words=bad[0].reason if bad else "", seconds=seconds)
    return judged(rows, fault, seconds)


def judged(rows: list[Result], fault: type[Upstream], seconds: float) -> Outcome:
    """Return whether the kit named the fault: by its check, its rank and its words, with hits counted."""
    hits = sum(row.extra.get("fault_hits", 0) for row in rows)
    for row in rows:
        for finding in row.findings:
            text = finding["message"] + row.extra.get("report", "")
            rank = fault.blamed is None or finding.get("rank") == fault.blamed
            if finding["check"] in fault.checks and rank and fault.says in text and hits:
                words = f"{finding['check']}: {finding['message'].splitlines()[0]}"
                return Outcome(outcome="caught", words=words[:160], seconds=seconds, hits=hits)
    return Outcome(outcome="missed", words="; ".join(row.reason for row in rows), seconds=seconds, hits=hits)


def line(name: str, side: str, said: Outcome) -> str:
    """Return one line of the table."""
    return f"{name:<16} {side:<9} {said.outcome:<8} {said.seconds:7.1f} s  {said.words}"


def mixin_file(folder: Path) -> Path:
    """Return the mixin's file in an unpacked source distribution of the installed version."""
    version = installed_version("transformers")
    file = folder / "tests" / "test_fsdp_mixin.py"
    info = folder / "PKG-INFO"
    if not file.is_file() or not info.is_file():
        raise SystemExit(f"--sdist={str(folder)!r} must be an unpacked source distribution: {file} is missing")
    if f"\nVersion: {version}\n" not in info.read_text(encoding="utf-8"):
        raise SystemExit(f"--sdist={str(folder)!r} must be of the installed transformers {version}")
    return file


def compare(fault: type[Upstream], file: Path, engine: Engine, limit: float) -> list[dict[str, object]]:
    """Run one fault on both sides and print what they say."""
    print(f"\n{fault.__name__}: {fault.story}\n  upstream: {fault.weakness}", flush=True)
    rows: list[dict[str, object]] = []
    for test in fault.shows:
        said = upstream(file, test, fault.__name__, limit)
        rows.append({"fault": fault.__name__, "side": "upstream", "test": test} | asdict(said))
        print(line(fault.__name__, "upstream", said), flush=True)
    said = kit(engine, fault.test, fault.variant, fault)
    rows.append({"fault": fault.__name__, "side": "kit", "test": fault.test} | asdict(said))
    print(line(fault.__name__, "kit", said), flush=True)
    return rows


def main() -> int:
    """Print the table; exit status 1 where the kit misses a fault or a side is red without one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", action="append", choices=[fault.__name__ for fault in FAULTS])
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="of one upstream test (120)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    file = mixin_file(options.sdist)
    chosen = [fault for fault in FAULTS if not options.only or fault.__name__ in options.only]
    engines = {deadline: Engine(Settings(backend="transformers", deadline=deadline)) for deadline in (60.0, 10.0)}
    rows: list[dict[str, object]] = []
    try:
        for test in sorted({test for fault in chosen for test in fault.shows}):
            said = upstream(file, test, "", options.limit)
            rows.append({"fault": "", "side": "upstream", "test": test} | asdict(said))
            print(line("(none)", "upstream", said), flush=True)
        for test, variant in sorted({(fault.test, fault.variant) for fault in chosen}):
            said = kit(engines[60.0], test, variant, None)
            rows.append({"fault": "", "side": "kit", "test": test} | asdict(said))
            print(line("(none)", "kit", said), flush=True)
        for fault in chosen:
            rows += compare(fault, file, engines[10.0 if fault.deadline else 60.0], options.limit)
    finally:
        for engine in engines.values():
            engine.close()
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return summary(rows)


def summary(rows: list[dict[str, object]]) -> int:
    """Print the totals; return 1 where the kit misses a fault or a side is red without one."""
    faults = list(dict.fromkeys(row["fault"] for row in rows if row["fault"]))

    def side_of(fault: object, side: str) -> list[object]:
        return [row["outcome"] for row in rows if (row["fault"], row["side"]) == (fault, side)]

    by_kit = [fault for fault in faults if "caught" in side_of(fault, "kit")]
    by_upstream = [fault for fault in faults if "caught" in side_of(fault, "upstream")]
    hangs = [fault for fault in faults if "hangs" in side_of(fault, "upstream")]
    red = [row for row in rows if not row["fault"] and row["outcome"] not in ("green", "skipped")]
    print(
        f"\n{len(faults)} faults: the kit catches {len(by_kit)}; upstream's tests catch {len(by_upstream)}, "
        f"hang on {len(hangs)}; {len(red)} runs without a fault are red"
    )
    return 1 if red or len(by_kit) < len(faults) else 0


if __name__ == "__main__":
    raise SystemExit(main())
