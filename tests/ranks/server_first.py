"""``python -m fsdp_testkit`` whose sessions hear the rank server before its ranks, whenever both have something to say.

On a busy machine that order comes by itself now and then.
"""

from __future__ import annotations

import selectors
import sys
import time
from typing import Any

from fsdp_testkit.cli import main
from fsdp_testkit.ranks import session
from fsdp_testkit.ranks.link import ServerLink


class ServerFirst(selectors.DefaultSelector):
    """Waits a little, so that more than one is ready, and sorts."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, the rank server first."""
        if not super().select(timeout):
            return []
        time.sleep(0.1)
        ready = super().select(0)
        first = [entry for entry in ready if isinstance(entry[0].data, ServerLink)]
        if first and ready[0] is not first[0]:
            sys.stderr.write("turned round\n")
        return first + [entry for entry in ready if entry not in first]


selectors_of_session: Any = session.selectors
selectors_of_session.DefaultSelector = ServerFirst

if __name__ == "__main__":
    sys.exit(main())
