"""``@pytest.mark.ranks``: any test function on several ranks."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from plugin_project import Project

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.plugin.ranks_marker import default_comm
from fsdp_testkit.plugin.values import pack, per_rank, unpack

GOOD = """
import os
import unittest
from pathlib import Path

import pytest

PARENT = os.getpid()

def total(value):
    import torch
    import torch.distributed as dist
    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor)
    return tensor.item()

@pytest.fixture
def number():
    return 10

@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("FROM_FIXTURE", "yes")

@pytest.mark.ranks(2)
def test_good(rank, world_size, number, tmp_path):
    assert total(rank + number) == 21.0
    assert world_size == 2
    assert os.environ["FROM_FIXTURE"] == "yes"
    assert isinstance(tmp_path, Path)
    return rank

@pytest.mark.ranks(2)
@pytest.mark.parametrize("shift", [1, (2, 3)])
def test_parameters(rank, shift):
    assert shift in (1, (2, 3))

class TestClass:
    @pytest.mark.ranks(2)
    def test_method(self, rank):
        assert self.other(rank) == 1.0

    def other(self, rank):
        return total(rank)

@pytest.mark.ranks(1, comm="none")
def test_no_group(rank_context):
    assert rank_context.comm == "none"

@pytest.mark.ranks(2)
def test_skip():
    pytest.skip("not here")

@pytest.mark.ranks(2)
def test_xfail():
    pytest.xfail("known")

@pytest.mark.ranks(2)
@pytest.mark.xfail(strict=True)
def test_marked_xfail(rank):
    assert rank == 5

def square(rank, world_size, factor):
    return [rank * factor, world_size, int(total(1))]

def test_values(on_ranks):
    assert on_ranks(square, 3, factor=2) == [[0, 3, 3], [2, 3, 3], [4, 3, 3]]
"""

BAD = """
import os
import time
import pytest

@pytest.fixture
def thing():
    return object()

@pytest.mark.ranks(2)
def test_assert(rank):
    print("said on", rank)
    values = [rank, 7]
    if rank == 1:
        assert values == [1, 8]

@pytest.mark.ranks(2)
def test_one_rank_skips(rank):
    if rank == 0:
        pytest.skip("just me")

@pytest.mark.ranks(2)
def test_dies(rank):
    if rank == 1:
        os._exit(3)
    import torch.distributed as dist
    dist.barrier()

@pytest.mark.ranks(2)
@pytest.mark.fsdp_deadline(2)
def test_hangs(rank):
    if rank == 1:
        time.sleep(1000)

@pytest.mark.ranks(2)
def test_thing(rank, thing):
    pass

def test_rank_without_marker(rank):
    pass

def test_local_function(on_ranks):
    on_ranks(lambda rank: rank, 2)

@pytest.mark.ranks(2)
def test_next_is_unaffected(rank, world_size):
    assert rank < world_size
"""


def test_what_passes_and_skips(project: Project) -> None:
    project.pytester.makepyfile(GOOD)
    project.run("-x", subprocess=True).assert_outcomes(passed=6, skipped=1, xfailed=2)


def test_what_fails(project: Project) -> None:
    project.pytester.makepyfile(BAD)
    result = project.run("-rA", subprocess=True)
    result.assert_outcomes(passed=1, failed=6, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "test_assert*: rank 1 of 2 raised AssertionError: assert *1, 7* == *1, 8*",
            "said on 1",
            "test_one_rank_skips: rank 0 skipped (just me), rank 1 did not",
            "test_dies: rank 1 of 2 exited with status 3 before it replied",
            "test_hangs: no reply from rank 1 of 2 within *: rank 1 is at test_hangs (*",
            "*argument thing is of type object, which cannot be sent to ranks*",
            "rank is for tests marked @pytest.mark.ranks(count)",
            "*<lambda>' cannot run on ranks: it must be a function or method of a module",
        ]
    )


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("ranks()", "it takes the number of ranks"),
        ("ranks(0)", "world_size=0 must be an integer of at least 1"),
        ("ranks(2, comm='mpi')", "comm='mpi' must be one of"),
        ("ranks(2, size=3)", "it takes the number of ranks"),
        ("ranks(2, stall=0)", "stall=0 must be seconds in"),
    ],
)
def test_a_wrong_marker_is_refused(project: Project, marker: str, text: str) -> None:
    project.pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_it(): pass\n")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*@pytest.mark.ranks*{text}*"])


SUBTESTS = """
import os
import pytest
from fsdp_testkit import per_rank

@pytest.mark.ranks(2)
def test_all_pass(rank, subtests):
    for number in range(2):
        with subtests.test("even", number=number):
            assert number >= 0

@pytest.mark.ranks(2)
def test_one_rank_fails_one(rank, subtests):
    import torch.distributed as dist
    for number in range(3):
        with subtests.test("small", number=number, kind="odd"):
            assert (rank, number) != (1, 2)
    with subtests.test():
        pytest.skip("not here")
    with subtests.test("later"):
        pytest.xfail("known")
    dist.barrier()

@pytest.mark.ranks(2)
def test_dies_after_a_subtest(rank, subtests):
    with subtests.test("first"):
        assert rank == 0
    if rank == 1:
        os._exit(3)

@pytest.mark.ranks(2)
@pytest.mark.parametrize("shift", [per_rank([10, 20]), per_rank([(1, 2), None])])
def test_own_values(rank, shift):
    assert shift in ([10, (1, 2)], [20, None])[rank]

def with_subtests(rank, value, subtests):
    with subtests.test("called", value=value):
        assert value == rank
    return value

def test_values(on_ranks):
    assert on_ranks(with_subtests, 3, value=per_rank([0, 1, 2])) == [0, 1, 2]
"""


def test_subtests_and_values_of_each_rank(project: Project) -> None:
    project.pytester.makepyfile(SUBTESTS)
    result = project.run("-vv", "-rA", subprocess=True)
    result.stdout.fnmatch_lines_random(
        [
            "*test_all_pass SUBPASSED*rank 1: even* (number=1)*",
            "*SUBFAILED*rank 1: small* (number=2, kind='odd')*",
            "*SUBSKIPPED*rank 0*not here*",
            "*SUBXFAIL*rank 1: later*",
            "AssertionError: assert (1, 2) != (1, 2)",
            "*test_one_rank_fails_one*contains 1 failed subtest",
            "*SUBFAILED*rank 1: first*",
            "test_dies_after_a_subtest: rank 1 of 2 exited with status 3 before it replied",
            "*SUBPASSED*rank 2: called* (value=2)*",
        ]
    )
    outcomes = result.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"], outcomes["subtests"]) == (4, 4, 13)


def test_a_value_for_each_rank_is_asked_for_before_anything_runs(project: Project) -> None:
    project.pytester.makepyfile(
        """
        import pytest
        from fsdp_testkit.plugin.values import per_rank
        @pytest.mark.ranks(2)
        @pytest.mark.parametrize("shift", [per_rank([1, 2, 3])])
        def test_it(shift): pass
        """
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*shift=per_rank*1, 2, 3* must have one value for each of 2 ranks"])


def test_a_unittest_case_is_refused(project: Project) -> None:
    project.pytester.makepyfile(
        """
        import unittest, pytest
        class TestIt(unittest.TestCase):
            @pytest.mark.ranks(2)
            def test_it(self): pass
        """
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*not for unittest.TestCase"])


def test_a_module_in_a_package(project: Project) -> None:
    package = project.pytester.mkpydir("deep")
    (package / "helper.py").write_text("VALUE = 3\n")
    (package / "test_inner.py").write_text(
        "import pytest\nfrom .helper import VALUE\n@pytest.mark.ranks(2)\ndef test_it(rank):\n    assert VALUE == 3\n"
    )
    project.run(subprocess=True).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, "x", [1, [2]], (1, (2,)), {"a": (1,)}, Path("a/b"), {"$fsdp_testkit": "path", "value": "x"}],
)
def test_values_travel_unchanged(value: object) -> None:
    back = unpack(pack("it", value, 2), 1)
    assert back == value
    assert type(back) is type(value)


def test_a_dtype_travels() -> None:
    import torch

    assert unpack(pack("it", [torch.bfloat16], 2), 0) == [torch.bfloat16]
    assert unpack(pack("it", PurePosixPath("x"), 2), 0) == Path("x")


@pytest.mark.parametrize(
    ("value", "text"), [({1: 2}, "it is of type dict"), ([{2}], r"it\[0\] is of type set"), (b"x", "bytes")]
)
def test_other_values_are_named(value: object, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        pack("it", value, 2)


@pytest.mark.parametrize(
    ("device", "count", "gpus", "comm"),
    [("cpu", 2, 8, "gloo"), ("cuda", 2, 2, "nccl"), ("cuda", 2, 1, "gloo"), ("cuda", 2, 0, "nccl")],
)
def test_ranks_that_share_a_gpu_get_gloo(device: str, count: int, gpus: int, comm: str) -> None:
    assert default_comm(device, count, gpus) == comm


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own_value(rank: int) -> None:
    packed = pack("it", [7, per_rank([(1, 2), per_rank("ab")])], 2)
    assert unpack(packed, rank) == [7, [(1, 2), "b"][rank]]
    with pytest.raises(UsageError, match=r"argument it is per_rank\(\[1\]\): 1 values for 2 ranks"):
        pack("it", per_rank([1]), 2)
