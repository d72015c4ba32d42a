"""Poisoned memory: every empty allocation is filled, and finite garbage shows what NaN does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fsdp_testkit.core.case import Case, ModelSpec
from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.core.layout import Layout
from fsdp_testkit.engine.engine import Engine, Settings
from fsdp_testkit.engine.tests import FSDP2
from fsdp_testkit.faults.weights import FilledIfNan, ScaleOfPlaceholder
from fsdp_testkit.scenarios.poison import GARBAGE, poisoned_memory


def emptied() -> torch.Tensor:
    return nn.Linear(5, 3, device="meta").to_empty(device="cpu").weight.detach()


ALLOCATIONS = {
    "empty": lambda: torch.empty(3, 5),
    "empty_like": lambda: torch.empty_like(torch.zeros(3, 5)),
    "empty_strided": lambda: torch.empty_strided((3, 5), (1, 3)),
    "empty_permuted": lambda: torch.empty_permuted((3, 5), (1, 0)),
    "new_empty": lambda: torch.zeros(2).new_empty(3, 5),
    "new_empty_strided": lambda: torch.zeros(2).new_empty_strided((3, 5), (1, 3)),
    "to_empty": emptied,
}


@pytest.mark.parametrize("make", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_every_empty_allocation_is_filled(make: object) -> None:
    assert callable(make)
    with poisoned_memory("nan"):
        assert make().isnan().all()
    with poisoned_memory("garbage"):
        found = make()
    assert found.abs().eq(GARBAGE).all()
    assert found.unique().numel() == 2  # both signs


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
)
def test_garbage_of_other_dtypes_is_finite_and_far_from_zero(dtype: torch.dtype) -> None:
    with poisoned_memory("garbage"):
        found = torch.empty(4, dtype=dtype).double()
    assert found.isfinite().all()
    assert found.abs().ge(1.0 if dtype == torch.bool else 127.0).all()


def test_what_has_values_keeps_them() -> None:
    for kind in ("nan", "garbage"):
        with poisoned_memory(kind):
            whole = torch.arange(6.0)
            assert (whole[2:] + 1).tolist() == [3.0, 4.0, 5.0, 6.0]
            assert torch.empty(3, device="meta").is_meta


def test_bad_kind_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="poison='zeros' must be one of nan, garbage"):
        Case(model=ModelSpec(model_type="llama"), layout=Layout(kind="fsdp", shard=2)).with_options(poison="zeros")
    with pytest.raises(UsageError, match="poison='zeros'"), poisoned_memory("zeros"):
        pass


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Settings())
    yield engine
    engine.close()


@pytest.mark.parametrize("fault", [FilledIfNan, ScaleOfPlaceholder], ids=lambda fault: fault.__name__)
def test_garbage_shows_what_nan_does_not(engine: Engine, fault: type) -> None:
    armed = engine.armed(f"{fault.__module__}:{fault.__qualname__}")
    spec = ModelSpec(model_type="llama", tie=False)
    plain = engine.case(engine.work(spec), "buffers_dtypes", FSDP2, steps=0)
    equal = {}
    for kind in ("nan", "garbage"):
        case = armed.case(engine.work(spec), "buffers_dtypes", FSDP2, steps=0).with_options(poison=kind)
        right, wrong = (engine.work(spec).train(item).get()[0].tensors for item in (plain, case))
        changed = {name for name in right if right[name].data != wrong[name].data}
        equal[kind] = not changed
    assert equal == {"nan": True, "garbage": False}
