"""Museum: bugs of training state: what is not saved, not restored, or restored for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Instead, blocks_of, local


class _Resume(Fault):
    """Acts after the training state was restored."""

    test = "resume"
    variant = "default"
    checks: ClassVar[tuple[str, ...]] = ("restored_optimizer", "resumed_optimizer")
    causes = ("state not restored",)

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore, then damage."""
        inner.load_training(*arguments)
        self.damage(arguments[0], arguments[1])
        self.hit()

    def damage(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change what was restored."""


class FrozenDropped(_Resume, bug="state-of-frozen-params-dropped"):
    """State of parameters that are frozen while loading is left out."""

    story = "a block that is frozen at the time of the load comes back without its moments"

    def damage(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Freeze a block, drop the state of what is frozen, thaw it."""
        block = blocks_of(model)[0]
        block.requires_grad_(False)
        for parameter in [held for held in optimizer.state if not held.requires_grad]:
            del optimizer.state[parameter]
        block.requires_grad_(True)


class UnshardedDropped(_Resume, bug="ignored-module-optimizer-load"):
    """State of parameters outside the sharded blocks is passed over."""

    story = "the load knows how to place the state of sharded blocks and skips what lies outside of them"

    def damage(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Drop the state of all parameters in no block."""
        inside = {id(parameter) for block in blocks_of(model) for parameter in block.parameters()}
        for parameter in [held for held in optimizer.state if id(held) not in inside]:
            del optimizer.state[parameter]


class MomentsRounded(_Resume, bug="custom-state-corrupted-by-dcp"):
    """State of a compressed kind does not come back as it was."""

    story = "second moments go through a narrower dtype between save and load: the first step explodes or drifts"

    def damage(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Round the second moments to eight bits."""
        for state in optimizer.state.values():
            part = local(state["exp_avg_sq"])
            part.copy_(part.to(torch.float8_e5m2).to(part.dtype))


class NeverSaved(Instead, _Resume, bug="optimizer-state-never-saved"):
    """The checkpoint holds model and scheduler only."""

    story = "nobody writes the optimizer's state, and the resumed run starts with an empty one"
    method = "save_training"

    def instead(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """Save an empty state."""
        optimizer = arguments[1]
        held = dict(optimizer.state)
        optimizer.state.clear()
        original(*arguments, **named)
        optimizer.state.update(held)
        self.hit()


class OtherFileName(_Resume, bug="optimizer-file-name-mismatch"):
    """The loader looks for another file than the saver wrote, and goes on without it."""

    story = "a file that is not there is passed over: optimizer and schedule start again"
    checks = ("restored_optimizer", "resumed_lrs")

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Load if the wrong name exists, which it does not."""
        if (Path(arguments[3]) / "optimizer.bin").exists():
            inner.load_training(*arguments)
        self.hit()


class MixedStreams(Fault, bug="rng-after-layout-change"):
    """Generators are restored where a rank finds a file of its own, and fresh elsewhere."""

    story = "rank 0 goes on with its saved random numbers while rank 1 starts new ones"
    test = "resume"
    variant = "default"
    checks = ("resumed_rng",)
    causes = ("RNG not restored",)
    blamed = 1
    kept: ClassVar[tuple[int, ...]] = (0,)

    def load_training(self, inner: Backend, arguments: tuple[Any, ...]) -> None:
        """Restore, and put the old generator back on the other ranks."""
        state = torch.get_rng_state()
        inner.load_training(*arguments)
        if self.rank not in self.kept:
            torch.set_rng_state(state)
            self.hit()
