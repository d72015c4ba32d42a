"""A finding names the host of its ranks where there are several."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.finding import Verdict
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.jobs import to_run
from fsdp_testkit.engine.outcome import judged
from fsdp_testkit.ranks import JobReport, RankReply
from fsdp_testkit.reporting.failure import failure_text


@pytest.mark.parametrize(
    ("hosts", "where"), [(("a", "a", "b"), "ranks 1 (host a), 2 (host b)"), (("", "", ""), "ranks 1, 2")]
)
def test_findings_name_hosts(tmp_path: Path, hosts: tuple[str, ...], where: str) -> None:
    spec = ModelSpec(model_type="llama")
    replies = [RankReply(rank=rank, host=host, status="ok", value={}) for rank, host in enumerate(hosts)]
    run = to_run(JobReport(outcome="passed", replies=replies, failure=None, notes=[], seconds=0.0, folder=tmp_path))

    def check() -> Verdict:
        verdict = Verdict.empty()
        for rank in (1, 2):
            verdict.expect(False, check="losses", message="loss is wrong", rank=rank, judged_by="truth")
        return verdict

    outcome = judged(Case(model=spec, layout=Layout(kind="fsdp", shard=3)), run, check)
    row = outcome.to_result(spec, "auto_vs_ddp", "untied", "reference", 0.0)
    assert where in failure_text([row])
