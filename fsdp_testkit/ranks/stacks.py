"""Reads what a rank left behind: Python stacks from ``faulthandler``, native error text in its log."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

#: Texts of errors that follow from the end of another rank. Collected from gloo, NCCL and TCPStore.
_CONSEQUENCE = re.compile(
    r"connection (was likely )?closed|connection reset by peer|connection refused|broken pipe|socket closed"
    r"|failed to recv, got 0 bytes|remote process exited|ncclRemoteError|remote rank exited"
    r"|received errors while waiting for send/recv|connectFullMesh failed"
    r"|connection timed out|no route to host|network is unreachable",
    re.IGNORECASE,
)
#: Texts of a process group that gave up waiting. Collected from NCCL's watchdog and gloo.
_TIMEOUT = re.compile(
    r"watchdog caught collective operation timeout|timed out waiting \d+ ?ms|wait timeout after \d+ ?ms", re.IGNORECASE
)
_FRAME = re.compile(r'^  File "(.+)", line (\d+|\?\?\?) in (.+)$')
_WRAPPERS = frozenset({"wrapper", "inner", "decorate_context", "_fn", "func_wrapper", "__call__"})
_C10D = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
_STDLIB = sysconfig.get_path("stdlib") + "/"
_OWN = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def is_consequence(text: str) -> bool:
    """Tell whether an error text says that another rank went away."""
    return _CONSEQUENCE.search(text) is not None


def is_whole(dump: str) -> bool:
    """Tell whether the end of a dump is the outermost frame of a rank, or the mark of one that was too deep."""
    last = dump.rstrip().rpartition("\n")[2].strip()
    return last == "..." or last.startswith('File "<string>"')


def is_timeout(text: str) -> bool:
    """Tell whether an error text says that a process group gave up waiting."""
    return _TIMEOUT.search(text) is not None


def threads(stack: str) -> list[list[Frame]]:
    """Return the threads of a dump, the one that got the signal first, with innermost frames first."""
    found: list[tuple[bool, list[Frame]]] = []
    for line in stack.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            found.append((line.startswith("Current"), []))
        elif (match := _FRAME.match(line)) and found:
            found[-1][1].append(Frame(*match.groups()))
    return [frames for _, frames in sorted(found, key=lambda item: not item[0]) if frames]


def sits_in(stack: str) -> tuple[str, str]:
    """Find what a rank waits for.

    Args:
        stack: a faulthandler dump.

    Returns:
        (collective, place): the call into ``torch.distributed`` that it is inside of, or ``""``, and the
        innermost frame outside torch and this package, or ``""``.
    """
    every = threads(stack)
    collective = ""
    place = ""
    for frames in every:
        collective = collective or _collective(frames)
        mine = [item for item in frames if not _is_torch(item) and not _is_own(item)]
        # A wait inside the standard library is the business of who called it.
        place = place or next((str(item) for item in [*(i for i in mine if not _is_stdlib(i)), *mine]), "")
    return collective, place


def waits_for_others(stack: str) -> bool:
    """Tell whether only another rank can wake this one.

    So it is when the thread that answered is in a collective, and no other thread is in anybody's own code: all that
    is left are idle workers, which wait in the standard library, and threads of torch's or of this package's.
    """
    every = threads(stack)
    if not every or not _collective(every[0]):
        return False
    return all(_is_torch(frames[0]) or _is_stdlib(frames[0]) or _is_own(frames[0]) for frames in every[1:])


def _collective(frames: list[Frame]) -> str:
    # Only frames of torch at the inner end count: a sleep in user code under a hook is no collective.
    inner: list[Frame] = []
    for item in frames:
        if not _is_torch(item):
            break
        inner.append(item)
    for index, item in enumerate(inner):
        if not item.file.endswith(_C10D):
            continue
        best = item
        for outer in inner[index:]:
            if not outer.file.endswith(_C10D):
                break
            if outer.function not in _WRAPPERS:
                best = outer
        return str(best)
    return next((str(item) for item in inner if "torch/distributed/" in item.file), "")


def _is_torch(frame: Frame) -> bool:
    return "/torch/" in frame.file


def _is_stdlib(frame: Frame) -> bool:
    return frame.file.startswith((_STDLIB, "<frozen ")) and "-packages" not in frame.file


def _is_own(frame: Frame) -> bool:
    return frame.file.startswith(_OWN) or frame.file == "<string>"


def own_part(text: str) -> str:
    """Return what ``faulthandler`` wrote without the frames of the harness and the list of extension modules."""
    kept = []
    for line in text.splitlines():
        match = _FRAME.match(line)
        if not (match and _is_own(Frame(*match.groups()))) and not line.startswith("Extension modules:"):
            kept.append(line)
    return "\n".join(kept)


def native_error(log: str) -> str:
    """Return the line of a log that says why the process ended: C++ exception, fatal error, or the like."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith("terminate called"):
            what = next((item for item in lines[index + 1 : index + 4] if item.startswith("what():")), "")
            return f"{line} {what}".strip()
    for line in lines:
        if line.startswith("Fatal Python error"):
            return line
    for line in reversed(lines):
        if re.search(r"\w*(error|exception)\b|\babort|\bassert|check failed", line, re.IGNORECASE):
            return line
    return ""


def tail(path: Path, size: int) -> str:
    """Return the last ``size`` bytes of a file as text, ``""`` where it is missing."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            length = file.tell()
            file.seek(max(0, length - size))
            text = file.read(size).decode("utf-8", "replace")
    except OSError:
        return ""
    return text if length <= size else f"...{text}"
