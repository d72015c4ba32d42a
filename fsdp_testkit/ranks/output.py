"""What a rank prints, up to a bound: the head and the tail are kept, whatever it prints in between is counted.

A rank writes into a pipe. It is not given a file: one that prints without end would fill the disk, and a full disk
would cost the report of the ranks that are well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

#: Bytes that are kept of the beginning and of the end.
HEAD = TAIL = 1 << 20
#: Bytes that are read after the rank has ended, should something that it started still print.
REST = 4 << 20
#: Bytes that a rank can print while the parent looks elsewhere.
PIPE = 1 << 18


class Output:
    """What one rank prints.

    Args:
        path: of its log.

    Attributes:
        inlet: file descriptor for the rank; `close_inlet` once it has it.
        outlet: file descriptor that is readable when there is something to `drain`; -1 once closed.
        size: bytes that were printed so far.
        problem: why the log is not complete, or ``""``.

    Raises:
        OSError: there are no more file descriptors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.problem = ""
        self._recent = bytearray()
        with contextlib.suppress(OSError):  # noticed when there is something to write
            path.touch()
        self.outlet, self.inlet = os.pipe()
        os.set_blocking(self.outlet, False)
        with contextlib.suppress(OSError):  # only a matter of speed, and a user's total is limited
            fcntl.fcntl(self.inlet, fcntl.F_SETPIPE_SZ, PIPE)

    def close_inlet(self) -> None:
        """Give back the end that the rank has by now."""
        os.close(self.inlet)
        self.inlet = -1

    def drain(self) -> bool:
        """Read what is there, at most a pipe full; return whether more may come."""
        if self.outlet < 0:
            return False
        try:
            data = os.read(self.outlet, PIPE)
        except BlockingIOError:
            return True
        if not data:
            return False
        if self.size < HEAD:
            self._write(data[: HEAD - self.size])
        self.size += len(data)
        self._recent += data
        if len(self._recent) > 2 * TAIL:
            del self._recent[:-TAIL]
        return True

    def finish(self) -> None:
        """Read the rest, complete the log and give back the file descriptors."""
        before = -1
        end = self.size + REST
        while before != self.size < end:
            before = self.size
            self.drain()
        late = max(0, self.size - HEAD)  # what is not in the log yet
        kept = min(late, TAIL)
        if late > kept:
            self.problem = self.problem or f"printed {self.size} bytes: its log has the first and the last {HEAD}"
            self._write(b"\n[%d bytes were cut here]\n" % (late - kept))
        if kept:
            self._write(bytes(self._recent[-kept:]))
        self.close()

    def close(self) -> None:
        """Give back the file descriptors."""
        for file in (self.outlet, self.inlet):
            if file >= 0:
                os.close(file)
        self.outlet = self.inlet = -1

    def tail(self, size: int) -> str:
        """Return the last ``size`` bytes as text."""
        text = bytes(self._recent[-size:]).decode("utf-8", "replace")
        return text if self.size <= size else f"...{text}"

    def _write(self, data: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            self.problem = f"has an incomplete log: {error.strerror}"
