"""Bugs whose first diagnosis is another cause than the expected one, each with the reason. Data only.

Every museum test holds its bug to this list: a bug in it that comes to be named right has to leave it.
"""

from __future__ import annotations

MISNAMED: dict[str, str] = {
    "optimizer-state-gather-on-some-ranks": "ranks that go on enter another collective: a mismatch is what is seen",
    "tied-in-two-groups-rejected": "the load fails before torch says that two units share a parameter",
}
