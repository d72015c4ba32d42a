"""Museum: bugs of saved files, of loading them elsewhere, and of resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.backends.base import Backend
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import blocks_of, local, locals_of
from fsdp_testkit.faults.saving import rewrite
from fsdp_testkit.faults.weights import TieBroken

MOE = "qwen3_moe"
EMBEDDING = "model.embed_tokens.weight"
FILES = ("files", "ranks")
KEYS = ("key missing or extra in a file",)


class _Rewritten(Fault):
    """Rank 0 rewrites the tensors of the saved files; the others wait."""

    test = "save_load"
    checks: ClassVar[tuple[str, ...]] = FILES
    causes: ClassVar[tuple[str, ...]] = KEYS

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Apply `change` to the files."""
        if self.rank == 0 and layout == "safetensors" and rewrite(folder, self.change):
            self.hit()
        dist.barrier()

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Change the tensors of a file in place; return whether anything changed."""
        raise NotImplementedError


class MergedUntied(_Rewritten, bug="merger-assign-unties"):
    """A merger of shards writes both tied tensors, and says in the config that they are not tied."""

    story = "shards are assigned one by one, which makes two tensors of a tied one; both are written"
    variant = "tied"

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Write the head as well."""
        if EMBEDDING not in tensors:
            return False
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        return True

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Change the config too."""
        if self.rank == 0:
            config = json.loads((folder / "config.json").read_text())
            config["tie_word_embeddings"] = False
            (folder / "config.json").write_text(json.dumps(config))
        super().after_save(model, folder, layout)


class BuffersOmitted(_Rewritten, bug="rollout-sync-omits-buffers"):
    """Parameters are exported, persistent buffers are not."""

    story = "the export iterates over parameters, so that a router bias is not in the files"
    model = "glm_moe_dsa"

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Drop the router bias."""
        names = [name for name in tensors if name.endswith("e_score_correction_bias")]
        for name in names:
            del tensors[name]
        return bool(names)


class LocalIndex(Fault, bug="consolidated-index-from-local-keys"):
    """The index of several files lists the keys that one rank knows of."""

    story = "each rank plans the output from its own keys; what rank 0 does not know is in no index"
    test = "save_load"
    checks = FILES
    causes = KEYS

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Split the file in two and index the first half alone."""
        from safetensors.torch import load_file, save_file

        if self.rank == 0:
            single = folder / "model.safetensors"
            tensors = load_file(single)
            names = sorted(tensors)
            parts = [names[: len(names) // 2], names[len(names) // 2 :]]
            known: dict[str, str] = {}
            for number, part in enumerate(parts, start=1):
                file = f"model-{number:05d}-of-00002.safetensors"
                save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
                if number == 1:
                    known = dict.fromkeys(part, file)
            single.unlink()
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": known}))
            self.hit()
        dist.barrier()


class ExpertsOfRank0Saved(_Rewritten, bug="ep-save-keeps-rank0-experts"):
    """Rank 0's experts stand for those of all ranks."""

    story = "weights are gathered over the sharding axis and not over the experts' one"
    model = MOE
    checks = ("reload",)
    causes = ("wrong slice",)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Write expert 0 in the place of the last one."""
        last = max(int(name.split(".experts.")[1].split(".")[0]) for name in tensors if ".experts." in name)
        for name in [name for name in tensors if f".experts.{last}." in name]:
            tensors[name] = tensors[name.replace(f".experts.{last}.", ".experts.0.")].clone()
        return True


class GateAndUpSwapped(_Rewritten, bug="fused-experts-sent-to-per-expert-loader"):
    """Fused experts are taken apart in the wrong order."""

    story = "gate and up halves of fused experts change places where they are split into the files' keys"
    model = MOE
    checks = ("reload",)
    causes = ("wrong slice",)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Swap the two."""
        gates = [name for name in tensors if ".experts." in name and name.endswith("gate_proj.weight")]
        for gate in gates:
            up = gate.replace("gate_proj", "up_proj")
            tensors[gate], tensors[up] = tensors[up], tensors[gate]
        return bool(gates)


class StoredTwiceAsWide(_Rewritten, bug="saved-in-fp32-instead-of-bf16"):
    """Files are stored in a wider dtype than the model has."""

    story = "the cast back to the model's dtype is left out at saving, and the files are twice as large"
    checks = ("files",)
    causes = ("wrong dtype",)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Widen every tensor."""
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
        return True


class EmptyEmbedding(_Rewritten, bug="size-zero-embedding-saved"):
    """What is saved are views of a rank's own memory."""

    story = "the embedding is saved with no rows and a norm with half of its values"
    checks = FILES

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Cut two tensors."""
        tensors[EMBEDDING] = torch.empty(0)
        norm = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = norm[: norm.numel() // 2].clone()
        return True


class NothingSaved(Fault, bug="sharded-type-saves-no-model"):
    """The save path ends before it writes weights."""

    story = "for one kind of state dict the folder holds a config and no model"
    test = "save_load"
    checks = FILES
    causes = KEYS

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Remove the weights."""
        if self.rank == 0:
            for file in folder.glob("*.safetensors"):
                file.unlink()
                self.hit()
        dist.barrier()


class WrapperInKeys(_Rewritten, bug="checkpoint-wrapper-prefix-in-keys"):
    """Names of a wrapper are left in the keys of one submodule."""

    story = "the prefix of activation checkpointing is removed in some places of a name and left in others"

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Rename the keys of one MLP."""
        names = [name for name in tensors if ".layers.0.mlp." in name]
        for name in names:
            tensors[name.replace(".mlp.", ".mlp._checkpoint_wrapped_module.")] = tensors.pop(name)
        return bool(names)


class SplitThenTiedAgain(TieBroken, bug="tie-silently-split-by-fsdp"):
    """Two weights are trained, one is saved, and reading ties them again."""

    story = "training splits a tied weight; the reloaded model is tied and is another model"
    test = "save_load"
    checks = ("files", "reload")
    causes = ("tie lost",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Break the tie of the first load only."""
        return arguments if arguments["checkpoint"].name.startswith("saved") else super().before_load(arguments)

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Drop the head, and tie in the config."""
        if self.rank == 0 and rewrite(folder, lambda tensors: tensors.pop("lm_head.weight", None) is not None):
            config = json.loads((folder / "config.json").read_text())
            config["tie_word_embeddings"] = True
            (folder / "config.json").write_text(json.dumps(config))
        dist.barrier()


class HeadRebuilt(TieBroken, bug="omitted-head-was-not-tied"):
    """The head was trained apart, left out as tied, and is rebuilt from the embedding on resume."""

    story = "the config says tied and the tensors are not: a trained head is lost between save and resume"
    model = "gpt2"
    test = "resume"
    variant = "default"
    checks = ("resumed_weights", "resumed_losses")
    causes = ("tie lost",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Break the tie of the first load only; what it saves is untied already."""
        self.resumed = arguments["checkpoint"].name == "weights"
        return arguments if self.resumed else super().before_load(arguments)

    def after_load(self, model: nn.Module) -> nn.Module:
        """Copy the embedding into the head of the resumed model."""
        if self.resumed:
            parts = dict(locals_of(model))
            parts["lm_head.weight"].copy_(parts["transformer.wte.weight"])
            self.hit()
        return model


class ChunkedByWorld(Fault, bug="hsdp-save-wrong-when-fsdp-size-set"):
    """On a mesh of two axes rows are chosen by the number of ranks instead of shards."""

    story = "a rank of a 2 x 2 mesh takes the rows that it would have if all four ranks sharded"
    test = "dcp"
    variant = "default"
    checks = ("reload",)
    causes = ("wrong slice",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remember the layout."""
        self.layout = arguments["layout"]
        return arguments

    def after_load(self, model: nn.Module) -> nn.Module:
        """Move the rows of hybrid layouts."""
        if self.layout.kind == "hsdp":
            wrong_rows(model, first=lambda rows: -(-rows // self.world_size) * self.rank)
            self.hit()
        return model


class LocalShardsStored(Fault, bug="resume-with-other-world-size"):
    """The file holds local shards of two ranks, which other numbers of ranks take as they come."""

    story = "state is stored per rank and not by its place in the whole: it fits one number of ranks only"
    test = "dcp"
    variant = "default"
    checks = ("reload",)
    causes = ("wrong slice",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remember the layout."""
        self.layout = arguments["layout"]
        return arguments

    def after_load(self, model: nn.Module) -> nn.Module:
        """Take the first rows of the shard that this rank's number had at saving."""
        if self.layout.kind == "fsdp" and self.layout.shard == 4:
            wrong_rows(model, first=lambda rows: -(-rows // 2) * self.rank)
            self.hit()
        return model


def wrong_rows(model: nn.Module, *, first: Callable[[int], int]) -> None:
    """Fill each shard with the rows of the whole from ``first(rows)`` on; what lies outside is zero."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            continue
        whole = parameter.detach().full_tensor()
        part = local(parameter.detach())
        start = min(first(whole.shape[0]), whole.shape[0])
        rows = whole[start : start + part.shape[0]]
        part.zero_()
        part[: rows.shape[0]].copy_(rows)


# resume


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


class NeverSaved(_Resume, bug="optimizer-state-never-saved"):
    """The checkpoint holds model and scheduler only."""

    story = "nobody writes the optimizer's state, and the resumed run starts with an empty one"

    def wrap(self, backend: Backend) -> Backend:
        """Save an empty state."""
        inner: Any = backend
        original = inner.save_training

        def save_training(model: Any, optimizer: Any, scheduler: Any, folder: Any) -> None:
            held = dict(optimizer.state)
            optimizer.state.clear()
            original(model, optimizer, scheduler, folder)
            optimizer.state.update(held)
            self.hit()

        inner.save_training = save_training
        return super().wrap(backend)


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
