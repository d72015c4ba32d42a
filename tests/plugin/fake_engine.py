"""The conftest of the small projects: an engine that answers from a table and logs what it was asked."""

import json
import os
import signal
from pathlib import Path

from fsdp_testkit.core.result import Result

HERE = Path(__file__).parent


def log(*words):
    with (HERE / "calls.log").open("a") as file:
        file.write("|".join([str(os.getpid()), *map(str, words)]) + "\n")


class FakeEngine:
    def __init__(self, options):
        self.options = options
        log("made", options.backend, options.seed, options.deadline)

    def expect(self, spec, cells):
        log("expect", spec.model_type, ",".join(f"{test}/{variant}" for test, variant in cells))

    def run_test(self, spec, test, variant):
        log("run", spec.model_type, test, variant, spec.config_class, spec.model_class, spec.config)
        table = HERE / "outcomes.json"
        wanted = json.loads(table.read_text()) if table.exists() else {}
        answer = wanted.get(f"{spec.model_type}__{test}", wanted.get(spec.model_type, "passed"))
        if answer == "raise":
            raise RuntimeError("the engine broke")
        if answer == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(answer, str):
            answer = [{"outcome": answer}]
        return [self.row(spec, test, variant, **fields) for fields in answer]

    def row(self, spec, test, variant, **fields):
        outcome = fields.setdefault("outcome", "passed")
        ran = outcome in ("passed", "failed")
        if outcome == "failed":
            fields.setdefault(
                "findings",
                [
                    {
                        "check": "gradients",
                        "message": "the gradient differs from truth's",
                        "rank": rank,
                        "step": 2,
                        "parameter": "model.layers.0.mlp.up_proj.weight",
                        "expected": "0.5",
                        "actual": "1.0",
                        "max_abs_error": 0.5,
                        "max_rel_error": 1.0,
                        "tolerance": 1e-6,
                        "judged_by": "truth",
                        "nature": "logic",
                    }
                    for rank in (0, 1)
                ],
            )
            fields.setdefault("extra", {"case": {"model": {"model_type": spec.model_type}, "layout": {"kind": "ddp"}}})
        if outcome in ("not_applicable", "skipped", "error"):
            fields.setdefault("reason", "the backend cannot do that")
        fields.setdefault("checks", 10 if ran else 0)
        fields.setdefault("tensors", 3 if ran else 0)
        fields.setdefault("max_rel_error", 1e-8 if ran else None)
        fields.setdefault("layout", "fsdp(2)")
        return Result(model_type=spec.model_type, test=test, variant=variant, backend=self.options.backend, **fields)

    def close(self):
        log("closed")


def pytest_fsdp_make_engine(options):
    return FakeEngine(options)
