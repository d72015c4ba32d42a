"""The harness: runs one function on several ranks and reports what each rank did. Knows nothing of FSDP.

```python
with Harness() as harness:
    report = harness.run(Job(target="package.module:function", world_size=2))
    if report.failure:
        print(report.failure.render())
```
"""

from fsdp_testkit.ranks.harness import DEFAULT_PRELOAD, Harness
from fsdp_testkit.ranks.hosts import Hosts
from fsdp_testkit.ranks.job import Job, JobFailure, JobReport, RankReply, pick_comm
from fsdp_testkit.ranks.rank import RankContext
from fsdp_testkit.ranks.slots import Lease, LeasedSlots, SlotBroker, Slots, cores

__all__ = [
    "DEFAULT_PRELOAD",
    "Harness",
    "Hosts",
    "Job",
    "JobFailure",
    "JobReport",
    "Lease",
    "LeasedSlots",
    "RankContext",
    "RankReply",
    "SlotBroker",
    "Slots",
    "cores",
    "pick_comm",
]
