"""The doctor: what it finds here, and what it says of a machine that lacks something."""

from __future__ import annotations

import pytest

from fsdp_testkit.core.errors import EnvironmentLacksError
from fsdp_testkit.ranks import doctor


def test_this_machine_is_examined() -> None:
    looks = {look.name: look for look in doctor.examine()}
    assert {"cores", "memory", "shared memory", "temporary files", "limit of open files", "NCCL", "CUDA"} <= set(looks)
    assert "two ranks agree on a sum" in looks["gloo on loopback"].found
    assert not any(look.fatal for look in looks.values())


def test_what_is_too_small_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMORY", "SHARED", "TEMPORARY", "FILES"):
        monkeypatch.setattr(doctor, name, 1 << 60)
    monkeypatch.setattr(doctor, "cores", lambda: 1)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (100, 100))  # type: ignore[attr-defined]
    looks = [doctor._cores(), doctor._memory(), *doctor._folders(), *doctor._limits()]
    assert all(look.advice for look in looks), looks
    assert not any(look.fatal for look in looks)


def test_ranks_that_cannot_start_are_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise EnvironmentLacksError("the rank server did not start")

    monkeypatch.setattr(doctor, "Harness", broken)
    (look,) = doctor._group()
    assert look.fatal
    assert look.found == "the rank server did not start"
