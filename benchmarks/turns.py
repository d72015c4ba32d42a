"""Methods that are measured side by side take turns: what else changes on the machine is the same for all.

Each turn has another order. What ran before a method decides how much memory the system has at hand for it, and that
was seen to change the time of one and the same load by more than half.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fsdp_testkit.ranks import Harness, Job

#: Method -> runs -> what each rank measured.
Runs = dict[str, list[list[dict[str, Any]]]]


def take_turns(harness: Harness, methods: Sequence[str], repeat: int, job: Job) -> Runs:
    """Return what the ranks of each method's jobs returned, in ``repeat`` runs.

    Each job is ``job`` with the method's name as a further argument, ``method``.

    One more run of each method comes first and is dropped; with ``repeat`` 0 it is the only one, and kept.

    Raises:
        SystemExit: a job failed.
    """
    runs: Runs = {name: [] for name in methods}
    order = random.Random(0)
    for turn in range(repeat + 1):
        for name in order.sample(list(methods), len(methods)):
            report = harness.run(replace(job, name=f"{job.name}: {name}", args={**job.args, "method": name}))
            if report.failure is not None:
                raise SystemExit(report.failure.render())
            if turn or not repeat:
                replies = sorted(report.replies, key=lambda reply: reply.rank)
                runs[name].append([reply.value for reply in replies])
            report.discard()
    return runs
