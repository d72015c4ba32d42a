"""Museum: bugs of saved files, of loading them elsewhere, and of resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_testkit.core.layout import Layout
from fsdp_testkit.faults.base import Fault
from fsdp_testkit.faults.parts import Rewritten, local, locals_of, set_in_config
from fsdp_testkit.faults.saving import TiedSavedTwice
from fsdp_testkit.faults.weights import TieBroken

MOE = "qwen3_moe"
EMBEDDING = "model.embed_tokens.weight"
FILES = ("files", "ranks")
KEYS = ("key missing or extra in a file",)


class MergedUntied(TiedSavedTwice, bug="merger-assign-unties"):
    """A merger of shards writes both tied tensors, and says in the config that they are not tied."""

    story = "shards are assigned one by one, which makes two tensors of a tied one; both are written"

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Change the config too."""
        if self.rank == 0:
            set_in_config(folder, tie_word_embeddings=False)
        super().after_save(model, folder, layout)


class BuffersOmitted(Rewritten, bug="rollout-sync-omits-buffers"):
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


class ExpertsOfRank0Saved(Rewritten, bug="ep-save-keeps-rank0-experts"):
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


class GateAndUpSwapped(Rewritten, bug="fused-experts-sent-to-per-expert-loader"):
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


class StoredTwiceAsWide(Rewritten, bug="saved-in-fp32-instead-of-bf16"):
    """Files are stored in a wider dtype than the model has."""

    story = "the cast back to the model's dtype is left out at saving, and the files are twice as large"
    checks = ("files",)
    causes = ("wrong dtype",)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Widen every tensor."""
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
        return True


class EmptyEmbedding(Rewritten, bug="size-zero-embedding-saved"):
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


class WrapperInKeys(Rewritten, bug="checkpoint-wrapper-prefix-in-keys"):
    """Names of a wrapper are left in the keys of one submodule."""

    story = "the prefix of activation checkpointing is removed in some places of a name and left in others"

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Rename the keys of one MLP."""
        names = [name for name in tensors if ".layers.0.mlp." in name]
        for name in names:
            tensors[name.replace(".mlp.", ".mlp._checkpoint_wrapped_module.")] = tensors.pop(name)
        return bool(names)


class SplitThenTiedAgain(Rewritten, TieBroken, bug="tie-silently-split-by-fsdp"):
    """Two weights are trained, one is saved, and reading ties them again."""

    story = "training splits a tied weight; the reloaded model is tied and is another model"
    test = "save_load"
    variant = "tied"
    checks = ("files", "reload")
    causes = ("tie lost",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Break the tie of the first load only."""
        return arguments if arguments["checkpoint"].name.startswith("saved") else super().before_load(arguments)

    def change(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Drop the head."""
        return tensors.pop("lm_head.weight", None) is not None

    def after_save(self, model: nn.Module, folder: Path, layout: str) -> None:
        """Tie in the config too."""
        if self.rank == 0:
            set_in_config(folder, tie_word_embeddings=True)
        super().after_save(model, folder, layout)


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


class _WrongRows(Fault):
    """Each shard of some layouts holds the rows of the whole from another one on; what lies outside is zero."""

    test = "dcp"
    variant = "default"
    checks = ("reload",)
    causes = ("wrong slice",)

    def before_load(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remember the layout."""
        self.layout: Layout = arguments["layout"]
        return arguments

    def after_load(self, model: nn.Module) -> nn.Module:
        """Move the rows where `applies` says so."""
        if not self.applies(self.layout):
            return model
        for parameter in model.parameters():
            if isinstance(parameter, DTensor):
                whole = parameter.detach().full_tensor()
                part = local(parameter.detach())
                start = min(self.first(whole.shape[0]), whole.shape[0])
                rows = whole[start : start + part.shape[0]]
                part.zero_()
                part[: rows.shape[0]].copy_(rows)
                self.hit()
        return model

    def applies(self, layout: Layout) -> bool:
        """Whether shards of this layout are wrong."""
        raise NotImplementedError

    def first(self, rows: int) -> int:
        """Return the row of the whole, of ``rows``, that this rank's shard begins with."""
        raise NotImplementedError


class ChunkedByWorld(_WrongRows, bug="hsdp-save-wrong-when-fsdp-size-set"):
    """On a mesh of two axes rows are chosen by the number of ranks instead of shards."""

    story = "a rank of a 2 x 2 mesh takes the rows that it would have if all four ranks sharded"

    def applies(self, layout: Layout) -> bool:
        """Two axes only."""
        return layout.kind == "hsdp"

    def first(self, rows: int) -> int:
        """Divide by the number of ranks."""
        return -(-rows // self.world_size) * self.rank


class LocalShardsStored(_WrongRows, bug="resume-with-other-world-size"):
    """The file holds local shards of two ranks, which other numbers of ranks take as they come."""

    story = "state is stored per rank and not by its place in the whole: it fits one number of ranks only"

    def applies(self, layout: Layout) -> bool:
        """Another number of ranks than at saving."""
        return layout.kind == "fsdp" and layout.shard == 4

    def first(self, rows: int) -> int:
        """Take the first rows of the shard that this rank's number had at saving."""
        return -(-rows // 2) * self.rank


class IndexedExperts(Fault, bug="indexing-dtensor-gathers-everything"):
    """Fused experts are taken apart by an index into the sharded tensor, which gathers all of it each time."""

    story = "a loop over the experts of a sharded tensor gathers all of it for each of them, and values are right"
    model = MOE
    test = "save_load"
    checks = ("traffic",)
    causes = ("memory held",)

    def before_save(self, model: nn.Module) -> nn.Module:
        """Look at each expert."""
        for name, parameter in model.named_parameters():
            if "experts" in name and isinstance(parameter, DTensor):
                for expert in range(parameter.shape[0]):
                    local(parameter.detach()[expert])
                    self.hit()
        return model
