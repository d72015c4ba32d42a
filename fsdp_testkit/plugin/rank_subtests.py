"""Subtests on ranks: each rank writes down how its own ended, and the parent reports them through pytest's fixture.

They are written as they end, so that those of a rank that dies or hangs later are reported all the same.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAME = "subtests-rank%d.jsonl"
_TEXT_LIMIT = 20_000


class RankSubtests:
    """What a test function on a rank gets as its argument ``subtests``; used like pytest's own.

    An assert that fails is kept to this rank, and the test goes on. Keep collectives out of a subtest that can fail on
    one rank alone: the others would wait in them.

    Args:
        folder: of the job.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / (_NAME % rank)
        self._path.touch()

    @contextmanager
    def test(self, msg: str | None = None, **kwargs: Any) -> Iterator[None]:
        """Run what is inside ``with`` as a subtest; see pytest's ``subtests.test``."""
        outcome, text = "passed", ""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, pytest.exit.Exception):
            raise
        except pytest.xfail.Exception as error:
            outcome, text = "xfailed", str(error)
        except pytest.skip.Exception as error:
            outcome, text = "skipped", str(error)
        except BaseException as error:
            outcome = "failed"
            inner = error.__traceback__ and error.__traceback__.tb_next  # without this function's own frame
            text = "".join(traceback.format_exception(type(error), error, inner))[-_TEXT_LIMIT:]
        shown = {name: repr(value)[:200] for name, value in kwargs.items()}
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps([msg, shown, outcome, text]) + "\n")


class _Shown:
    """Has the text that was its value's on the rank."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def report_subtests(subtests: pytest.Subtests, folder: Path, ranks: int) -> None:
    """Report what the ranks' subtests came to, rank by rank.

    Args:
        subtests: pytest's fixture.
        folder: of the job.
        ranks: how many there were.
    """
    for rank in range(ranks):
        path = folder / (_NAME % rank)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                msg, shown, outcome, text = json.loads(line)
            except ValueError:  # its rank died while writing
                continue
            title = f"rank {rank}" if msg is None else f"rank {rank}: {msg}"
            with subtests.test(title, **{name: _Shown(value) for name, value in shown.items()}):
                if outcome == "failed":
                    pytest.fail(text, pytrace=False)
                elif outcome == "skipped":
                    pytest.skip(text)
                elif outcome == "xfailed":
                    pytest.xfail(text)
