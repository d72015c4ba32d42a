"""Metadata of DCP folders: what its pickles may hold, whichever Python wrote them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint import metadata

from fsdp_testkit.reference.dcp import _Plain

ENCODING = metadata._MEM_FORMAT_ENCODING


class Asks:
    """Is pickled as a call of ``getattr``, as Python 3.11.2 pickles members of enums."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, self.arguments


def load(value: Any) -> Any:
    return _Plain(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize("member", list(ENCODING))
def test_members_of_enums(member: Any) -> None:
    assert load(member) is member
    assert load(Asks(ENCODING, member.name)) is member


@pytest.mark.parametrize(
    "asked",
    [(ENCODING, "__class__"), (ENCODING, "mro"), (metadata.TensorStorageMetadata, "__init__"), ("text", "format")],
)
def test_nothing_else_is_fetched_by_name(asked: tuple[Any, str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr of .* has no place in checkpoint metadata"):
        load(Asks(*asked))
