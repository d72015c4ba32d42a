"""A progress bar for loads that take a while."""

from __future__ import annotations

import time
from typing import Any

#: seconds that a load may take without a word
PATIENCE = 1.0


class Progress:
    """Shows bytes loaded so far, once a load has taken longer than a second.

    Args:
        total: bytes to come.
        shown: whether this process shows anything.
    """

    def __init__(self, total: int, *, shown: bool) -> None:
        self.total = total
        self.done = 0
        self._shown = shown
        self._began = time.monotonic()
        self._bar: Any = None

    def add(self, nbytes: int) -> None:
        """Count bytes that have been loaded."""
        self.done += nbytes
        if not self._shown:
            return
        if self._bar is None and time.monotonic() - self._began > PATIENCE:
            from tqdm import tqdm  # comes with transformers

            self._bar = tqdm(total=self.total, unit="B", unit_scale=True, desc="loading", leave=False)
        if self._bar is not None:
            self._bar.update(self.done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
