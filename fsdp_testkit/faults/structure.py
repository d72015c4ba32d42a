"""Faults in structure: units that are missing, flags that are swapped."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Sharding


class BlockNotWrapped(Sharding):
    """One repeated block is left to the root unit."""

    story = "the first block is no FSDP unit"
    thread = "https://github.com/huggingface/transformers/pull/44083"
    test = "sharding_structure"
    checks = ("structure",)
    causes = ("not wrapped",)

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Skip the first block of each load."""
        if not isinstance(module, list) and "Layer" in type(module).__name__ and not self.hits:
            self.hit()
            return module
        return original(module, **arguments)


class RootNotWrapped(Sharding):
    """``fully_shard`` is never called on the model itself."""

    story = "what lies outside the blocks is not sharded"
    test = "sharding_structure"
    checks = ("structure",)

    def shard(self, original: Any, module: Any, **arguments: Any) -> Any:
        """Skip the module that has a head."""
        if not isinstance(module, list) and hasattr(module, "get_output_embeddings") and hasattr(module, "lm_head"):
            self.hit()
            return module
        return original(module, **arguments)


class ReshardSwapped(Fault, bug="root-never-resharded"):
    """Reshard-after-forward flags are the opposite of what the plan says."""

    story = "blocks keep their weights, head and norm free theirs"
    test = "sharding_structure"
    checks = ("reshard",)
    causes = ("not resharded",)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Keep every block's full weight after forward."""
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule) and name:
                module.set_reshard_after_forward(False, recurse=False)
                self.hit()
        return model
