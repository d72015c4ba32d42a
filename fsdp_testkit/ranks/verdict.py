"""From what is known of each rank to the verdict: which rank failed first, why, and an account to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fsdp_testkit.ranks.job import Job, JobFailure, RankReply, indent
from fsdp_testkit.ranks.stacks import is_timeout, own_part

_BROKEN = ("raised", "died", "lost")
#: Lines of a rank's output that a report shows; the rest is in its log.
STDERR_SHOWN = 20


def judge(
    job: Job, replies: Sequence[RankReply], times: Sequence[float], stalled: float = 0.0
) -> tuple[str, JobFailure | None]:
    """Decide the outcome of a job.

    Args:
        job: what was asked for.
        replies: one per process; ``consequence`` is set here.
        times: when the fate of each rank was decided, on one clock.
        stalled: seconds for which the job had stood still when it was ended for that; 0 where it was not.

    Returns:
        (outcome, failure) as in `JobReport`.
    """
    if all(reply.status == "skipped" for reply in replies):
        return "skipped", None
    idle = [item.rank for item in replies if item.status == "ok" and item.observations < job.min_observations]
    if all(reply.status == "ok" for reply in replies) and not idle:
        return "passed", None
    kind, first, sentence = _cause(job, replies, times, idle, stalled)
    summary = f"{job.title}: {sentence}"
    return "failed", JobFailure(kind=kind, first_rank=first, summary=summary, text=_account(replies, first))


def _cause(
    job: Job, replies: Sequence[RankReply], times: Sequence[float], idle: list[int], stalled: float
) -> tuple[str, int, str]:
    count = len(replies)
    broken = [reply for reply in replies if reply.status in _BROKEN]
    roots = [reply for reply in broken if not reply.consequence]
    late = [reply for reply in roots if is_timeout(reply.error)]
    if late and len(late) == len(roots):
        return _gave_up(replies, late)
    if broken:
        # A death is noticed a little later than the errors that it causes elsewhere.
        first = min(roots or broken, key=lambda reply: times[reply.rank] - 0.05 * (reply.status == "died"))
        first.consequence = False
        return _kind(first), first.rank, f"{_names([first])} of {count} {_deed(first)}"
    hung = [reply for reply in replies if reply.status == "hung"]
    skipped = [reply for reply in replies if reply.status == "skipped"]
    if hung and not skipped:
        return _hang(job, replies, hung, stalled)
    if skipped:
        lone = skipped[0]
        others = _names([reply for reply in replies if reply.status != "skipped"])
        reason = f" ({_line(lone.error)})" if lone.error else ""
        return (
            "lone_skip",
            lone.rank,
            f"{_names(skipped)} skipped{reason}, {others} did not",
        )
    found = replies[idle[0]].observations
    made = "no observation" if found == 0 else f"{found} of at least {job.min_observations} observations"
    return (
        "no_observation",
        idle[0],
        f"{_names([replies[rank] for rank in idle])} of {count} reported success but made {made}",
    )


def _gave_up(replies: Sequence[RankReply], late: list[RankReply]) -> tuple[str, int, str]:
    """Judge a hang that the process group noticed itself: who waited is known, and is not to blame."""
    waited = {reply.rank for reply in late}
    others = [item for item in replies if item.rank not in waited and not item.consequence]
    elsewhere = [item for item in others if not item.collective]
    first = (elsewhere or others or late)[0]
    parts = [f"{_names([item])} {_deed(item)}" for item in others]
    names = f"{_names(late)} of {len(replies)}"
    return "hang", first.rank, "; ".join([f"{names} gave up waiting: {_line(late[0].error)}", *parts])


def _hang(job: Job, replies: Sequence[RankReply], hung: list[RankReply], stalled: float) -> tuple[str, int, str]:
    # Who waits in a collective waits for somebody: the rank that is elsewhere is the one to look at.
    elsewhere = [reply for reply in hung if not reply.collective]
    returned = [reply for reply in replies if reply.status == "ok"]
    first = (elsewhere or hung)[0].rank
    parts = [f"{_names([item])} {_place(item)}" for item in sorted(hung, key=lambda item: item.rank != first)]
    if returned:
        parts.append(f"{_names(returned)} had returned")
        if not elsewhere:
            first = returned[0].rank
    silent = f"{_names(hung)} of {len(replies)}"
    how = f"no reply from {silent} within {job.deadline:g} s"
    if stalled:
        how = f"{silent} cannot go on, and stood still for {stalled:.0f} s"
    return "hang", first, f"{how}: {'; '.join(parts)}"


def _place(reply: RankReply) -> str:
    if reply.collective:
        return f"waits in {reply.collective}" + (f", called in {reply.error}" if reply.error else "")
    if reply.stack:
        return f"is at {reply.error}" if reply.error else "is in Python code of its own"
    return f"wrote no stack: {reply.error}" if reply.error else "wrote no stack"


def _kind(reply: RankReply) -> str:
    if reply.status == "raised":
        return "exception"
    if reply.status == "lost":
        return "lost"
    return "signal" if reply.signal else "exit"


def _deed(reply: RankReply) -> str:
    detail = f": {_line(reply.error)}" if reply.error else ""
    if reply.status == "raised":
        return f"raised {_line(reply.error)}"
    if reply.status == "skipped":
        return f"skipped{detail}"
    if reply.status == "lost":
        return f"was lost{detail}"
    if reply.status == "died":
        if reply.signal:
            hint = " (out of memory?)" if reply.signal == "SIGKILL" and not detail else ""
            return f"was ended by {reply.signal} before it replied{hint}{detail}"
        return f"exited with status {reply.exitcode} before it replied{detail}"
    if reply.status == "hung":
        return f"did not reply; it {_place(reply)}"
    if reply.status == "stopped":
        return f"was stopped after the failure; it {_place(reply)}"
    return f"returned after {reply.seconds:.2f} s with {reply.observations} observations"


def _account(replies: Sequence[RankReply], first: int) -> str:
    groups: dict[str, list[RankReply]] = {}
    for reply in sorted(replies, key=lambda item: (item.rank != first, item.status == "ok", item.consequence)):
        body = _body(reply)
        deed = _deed(reply)
        # Ports, addresses and times differ from rank to rank in what is the same traceback.
        key = f"{reply.status}|{re.sub(r'0x[0-9a-f]+|[0-9]+', '#', deed + body)}"
        groups.setdefault(key, []).append(reply)
    parts = []
    for members in groups.values():
        lead = members[0]
        mark = " (a consequence of another rank's end)" if lead.consequence else ""
        if lead.rank == first:
            mark = " <- look here first" if len(members) == 1 else f" <- rank {first} first"
        text = f"{_names(members)} {_deed(lead)}{mark}"
        body = _body(lead)
        parts.append(f"{text}\n{indent(body)}" if body else text)
    logs = [f"  rank {reply.rank}: {reply.log}" for reply in replies if reply.log is not None]
    return "\n\n".join([*parts, "logs:\n" + "\n".join(logs)] if logs else parts)


def _body(reply: RankReply) -> str:
    if reply.status in ("ok", "skipped"):
        return ""
    parts = [reply.traceback.rstrip(), reply.stack.rstrip()]
    if reply.status in ("died", "hung", "stopped") and reply.stderr.strip():
        lines = [line for line in own_part(reply.stderr).splitlines() if line.strip()]
        parts.append("last output:\n" + indent("\n".join(lines[-STDERR_SHOWN:])))
    return "\n".join(part for part in parts if part)


def _names(replies: Sequence[RankReply]) -> str:
    """Return ``rank 1``, ``ranks 0-2, 5``, or with hosts ``ranks 0-1 (host a), 2 (host b)``."""
    runs: list[list[RankReply]] = []
    for reply in sorted(replies, key=lambda item: item.rank):
        if runs and reply.rank == runs[-1][-1].rank + 1 and reply.host == runs[-1][-1].host:
            runs[-1].append(reply)
        else:
            runs.append([reply])
    spans = [
        (str(run[0].rank) if len(run) == 1 else f"{run[0].rank}-{run[-1].rank}")
        + (f" (host {run[0].host})" if run[0].host else "")
        for run in runs
    ]
    return f"rank{'s' if len(replies) > 1 else ''} {', '.join(spans)}"


def _line(text: str) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first if len(first) <= 300 else first[:300] + "..."


def explain(replies: Sequence[RankReply], failure: JobFailure | None) -> str:
    """Return what the second run, with collective checking, says about a hang of the first."""
    for reply in replies:
        if not reply.consequence and re.search(r"mismatch between collectives|monitoredBarrier", reply.error):
            # Of the tensors' options only the device says something, and that is nearly always the same.
            return re.sub(r",? ?(TensorDeviceTypes=)?TensorOptions\(.*?memory_format=\(\w+\)\)", "", reply.error)[:2000]
    if failure is None:
        return "the second run did not hang: the hang depends on timing"
    if failure.kind == "hang":
        return "it hung again, and no mismatch of collectives was found"
    return failure.summary[:2000]
