from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import local_ranks
import pytest
import small
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fsdp_testkit.reference import BindError, SwitchError, bind_optimizer, efficient_loading, load_sharded, switched


def groups(model: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [item for item in named if item[1].ndim > 1], "weight_decay": 0.1},
        {"params": [item for item in named if item[1].ndim == 1], "lr": 0.5, "weight_decay": 0.0},
    ]


def stepped(whole: Any) -> torch.optim.AdamW:
    """Return an optimizer with state: one step on the unsharded model."""
    optimizer = torch.optim.AdamW(groups(whole), lr=0.01, eps=1e-3)  # no rounding is amplified
    whole.train()(**small.batch(7)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def bound(rank: int, base: Path, shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    whole = small.build("llama", tie=True)
    optimizer = stepped(whole)
    expected = copy.deepcopy(optimizer.state_dict())
    if rank == 0:
        whole.eval().save_pretrained(base / "stepped")
    dist.barrier()
    model = load_sharded(base / "stepped", mesh)
    old = [weakref.ref(parameter) for parameter in whole.parameters()]
    states = [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if v.ndim]
    bind_optimizer(optimizer, model)
    # no reference to a full tensor is left but the caller's own
    del whole
    gc.collect()
    assert [ref for ref in old + states if ref() is not None] == []
    assert len(states) > 30
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = optimizer.state_dict()
    for group, before in zip(optimizer.param_groups, expected["param_groups"], strict=True):
        assert [names[id(parameter)] for parameter in group["params"]] == before["param_names"]
        assert all(isinstance(parameter, DTensor) for parameter in group["params"])
    for key in ("lr", "weight_decay", "betas", "params"):
        assert [g[key] for g in found["param_groups"]] == [g[key] for g in expected["param_groups"]]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        for key, value in state.items():
            now = found["state"][index][key]
            assert torch.equal(now.full_tensor() if isinstance(now, DTensor) else now, value), (index, key)
    # the next step is the one that the unsharded pair would take
    whole = small.build("llama", tie=True)
    reference = stepped(whole)
    for one, optim in ((whole, reference), (model, optimizer)):
        one.train()(**small.batch(3)).loss.backward()  # the same batch on all ranks: their mean is the whole's
        optim.step()
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_an_optimizer_made_before_sharding_goes_on(tmp_path: Path, shape: tuple[int, ...]) -> None:
    local_ranks.run(bound, torch.Size(shape).numel(), tmp_path, shape)


def test_what_does_not_fit_is_said_and_nothing_changed(tmp_path: Path, claim: Any) -> None:
    model = load_sharded(small.checkpoint(tmp_path, "llama"), claim(0, 2))
    whole = small.build("llama")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(BindError, match="does not know its parameters' names"):
        bind_optimizer(optimizer, model)
    with pytest.raises(BindError, match="named nowhere has no heir"):
        bind_optimizer(optimizer, model, small.build("llama"))
    wider = small.build("llama", vocab_size=64)
    other = torch.optim.SGD(wider.named_parameters(), lr=0.1)
    with pytest.raises(BindError, match=r"embed_tokens.weight' has shape \(64, 32\) in the optimizer"):
        bind_optimizer(other, model)
    optimizer.state[whole.lm_head.weight]["row"] = torch.ones(3)
    with pytest.raises(BindError, match=r"state of 'lm_head.weight': a tensor of shape \(3,\) cannot be cut"):
        bind_optimizer(optimizer, model, whole)
    assert optimizer.param_groups[0]["params"][0] is next(whole.parameters())
    del optimizer.state[whole.lm_head.weight]["row"]
    for names in (whole, dict(whole.named_parameters()), whole.named_parameters()):
        again = torch.optim.SGD(whole.parameters(), lr=0.1)
        bind_optimizer(again, model, names)
        assert again.param_groups[0]["params"][0] is next(model.parameters())
    with torch.device("meta"):  # created where nothing has values yet
        bare = type(whole)(whole.config)
    optimizer = torch.optim.AdamW(bare.named_parameters())
    bind_optimizer(optimizer, model)
    assert optimizer.param_groups[0]["params"][-1] is model.lm_head.weight


def test_two_parameters_cannot_have_one_heir(tmp_path: Path, claim: Any) -> None:
    model = load_sharded(small.checkpoint(tmp_path, "llama", tie=True), claim(0, 2))
    untied = small.build("llama")
    optimizer = torch.optim.SGD(untied.parameters(), lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    text = r"\['lm_head.weight', 'model.embed_tokens.weight'\] are tied in the model and two parameters"
    with pytest.raises(BindError, match=text):
        bind_optimizer(optimizer, model, untied)
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], before, strict=True))


def test_switches_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_OLD", "before")
    monkeypatch.delenv("KIT_NEW", raising=False)

    def fail() -> None:
        with switched({"KIT_OLD": None, "KIT_NEW": "set"}):
            assert "KIT_OLD" not in os.environ
            assert os.environ["KIT_NEW"] == "set"
            os.environ["KIT_NEW"] = "changed by others"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.environ["KIT_OLD"] == "before"
    assert "KIT_NEW" not in os.environ
    for bad in ({"A=B": "1"}, {"": "1"}, {"A": 1}, {"A": "\0"}):
        with pytest.raises(SwitchError), switched({"KIT_OLD": "x", **bad}):  # type: ignore[dict-item]
            pass
        assert os.environ["KIT_OLD"] == "before"


def test_a_switch_without_effect_is_an_error(claim: Any) -> None:
    before = dict(os.environ)
    with pytest.raises(SwitchError, match="no process group is initialised"), efficient_loading():
        pass
    claim(0, 2)
    from transformers.distributed import is_fsdp_enabled

    with efficient_loading():
        assert is_fsdp_enabled()
    assert not is_fsdp_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsdp_testkit.reference.adapter.waits_for_rank0", lambda: False)
        with pytest.raises(SwitchError, match="transformers ignores them"), efficient_loading():
            pass
    assert dict(os.environ) == before
