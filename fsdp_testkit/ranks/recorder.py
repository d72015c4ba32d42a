"""What torch's flight recorder knows of the collectives of each rank, and the first ones that do not match.

Both NCCL and gloo keep their last collectives in a ring buffer. NCCL writes it to a file, as a pickle, when its
watchdog gives up or when something is written into a pipe; for gloo a thread of the rank writes it, as JSON, in the
run that explains a hang. The fields are the same, see
https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html. The function that gloo's comes from is
private to torch; without it a hang is explained by less.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Collectives that are kept of a rank.
ENTRIES = 2000
#: Seconds between two dumps of gloo's.
PERIOD = 0.5
_SIZE_LIMIT = 64 << 20
_STEM = "collectives-rank"


def environment(logs: Path, comm: str) -> dict[str, str]:
    """Return what switches the recorder on, for processes that have not imported torch's backends yet.

    Args:
        logs: folder for the dumps.
        comm: ``gloo`` or ``nccl``.
    """
    env = {"TORCH_FR_BUFFER_SIZE": str(ENTRIES), "TORCH_FR_DUMP_TEMP_FILE": str(logs / _STEM)}
    if comm == "nccl":
        env |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(logs / "dump-rank")}
    return env


def available() -> bool:
    """Tell whether gloo's record can be had; torch is imported by who asks."""
    return hasattr(sys.modules.get("torch._C._distributed_c10d"), "_dump_fr_trace_json")


def ask_nccl(logs: Path, rank: int) -> None:
    """Ask a rank's NCCL for a dump; nothing happens where it does not listen."""
    try:
        pipe = os.open(logs / f"dump-rank{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.write(pipe, b"1\n")
    except OSError:
        pass
    finally:
        os.close(pipe)


def keep_dumping(logs: Path, rank: int) -> None:
    """On a rank: write gloo's collectives to a file now and then, as long as this process lives."""
    dist: Any = sys.modules.get("torch._C._distributed_c10d")
    # without stacks, which it would import half of torch for: faulthandler has them
    if (dump := getattr(dist, "_dump_fr_trace_json", None)) is None:
        return

    path = logs / f"{_STEM}{rank}"

    def write() -> None:
        path.with_suffix(".part").write_bytes(dump())
        path.with_suffix(".part").replace(path)

    def loop() -> None:
        while True:
            time.sleep(PERIOD)
            write()

    write()
    threading.Thread(target=loop, name="fsdp_testkit-recorder", daemon=True).start()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One collective of one rank.

    Attributes:
        group: name of the process group.
        number: of the collective in its group, from 1; point-to-point messages are counted apart.
        what: operation, shapes and dtypes.
        place: where it was called.
        done: whether it has ended.
    """

    group: str
    number: int
    what: str
    place: str
    done: bool


class _Plain(pickle.Unpickler):
    """Reads nothing but containers, numbers and text."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a dump has no business with {module}.{name}")


def read(logs: Path, ranks: int) -> dict[int, list[Entry]]:
    """Return the collectives of each rank that left a dump, in their order."""
    found = {}
    for rank in range(ranks):
        path = logs / f"{_STEM}{rank}"
        try:
            if path.stat().st_size <= _SIZE_LIMIT:
                data = path.read_bytes()
                dump = json.loads(data) if data.startswith(b"{") else _Plain(io.BytesIO(data)).load()
                found[rank] = [_entry(item) for item in dump.get("entries", []) if not item.get("is_p2p")]
        except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue
    return found


def _entry(item: Mapping[str, Any]) -> Entry:
    sizes, dtypes = item.get("input_sizes") or [], item.get("input_dtypes") or []
    tensors = ", ".join(f"{dtype}{list(size)}" for size, dtype in zip(sizes, dtypes, strict=False))
    operation = str(item["profiling_name"]).partition(":")[2] or str(item["profiling_name"])
    name, described = (*item["process_group"], "")[:2]
    group = described if described not in ("", "undefined") else f"group {name}"
    return Entry(
        group=str(group),
        number=int(item["collective_seq_id"]),
        what=f"{operation}({tensors})",
        place=_place(item.get("frames") or []),
        done=bool(item.get("retired")) or item.get("state") == "completed",
    )


def _place(frames: Sequence[Mapping[str, Any]]) -> str:
    """Return the innermost frame outside torch."""
    for frame in frames:
        if "/torch/" not in frame["filename"]:
            return f"{frame['name']} ({Path(frame['filename']).name}:{frame['line']})"
    return ""


def mismatch(ranks: Mapping[int, Sequence[Entry]], places: Mapping[int, str] | None = None) -> str:
    """Compare the ranks' collectives group by group; return the first ones that do not match, or ``""``.

    Args:
        ranks: the collectives of two ranks or more. Every group that any of them used is taken to have all ranks
            that used it, and to have had the ranks that stopped before it as well.
        places: where ranks wait, for records without stacks.
    """
    ranks = {rank: _placed(entries, (places or {}).get(rank, "")) for rank, entries in ranks.items()}
    if len(ranks) < 2:
        return ""
    tables = {rank: {(entry.group, entry.number): entry for entry in entries} for rank, entries in ranks.items()}
    groups = {entry.group for entries in ranks.values() for entry in entries}
    # What a full buffer has dropped on one rank is no difference: only what all can still know is compared.
    oldest = {
        group: max(min((key[1] for key in table if key[0] == group), default=1) for table in tables.values())
        for group in groups
    }
    for key in sorted({key for table in tables.values() for key in table}, key=lambda key: (_since(key, ranks), key)):
        if key[1] < oldest[key[0]]:
            continue
        there = {rank: table[key] for rank, table in tables.items() if key in table}
        if len({entry.what for entry in there.values()}) > 1:
            return f"collective {key[1]} of {key[0]} differs: {_list(there.items())}"
        waiting = {rank: entry for rank, entry in there.items() if not entry.done}
        missing = [rank for rank in tables if rank not in there]
        if waiting and missing:
            text = f"collective {key[1]} of {key[0]} was not entered by all: {_list(waiting.items())}"
            return "; ".join([text, *(f"the record of rank {rank} {_end(ranks[rank])}" for rank in missing)])
    return ""


def _placed(entries: Sequence[Entry], place: str) -> Sequence[Entry]:
    """Return the entries, with the place of the one that its rank waits in."""
    if not entries or entries[-1].done or entries[-1].place:
        return entries
    return [*entries[:-1], replace(entries[-1], place=place)]


def _since(key: tuple[str, int], ranks: Mapping[int, Sequence[Entry]]) -> int:
    """Return how many collectives came before this one on the rank that was the first to enter it."""
    places = [
        index for entries in ranks.values() for index, entry in enumerate(entries) if (entry.group, entry.number) == key
    ]
    return min(places)


def _list(items: Iterable[tuple[int, Entry]]) -> str:
    return ", ".join(f"rank {rank} {_tell(entry)}" for rank, entry in items)


def _tell(entry: Entry) -> str:
    where = f", called in {entry.place}" if entry.place else ""
    return f"{entry.what}{where}"


def _end(entries: Sequence[Entry]) -> str:
    if not entries:
        return "is empty"
    last = entries[-1]
    state = "which had ended" if last.done else "which it waits in"
    return f"ends with collective {last.number} of {last.group}: {_tell(last)}, {state}"
