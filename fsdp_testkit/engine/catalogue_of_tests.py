"""The tests, their variants and what a backend must be able to express. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("untied", "tied")
#: ``core`` always runs; ``extended`` runs beside it where it is asked for.
TIERS = ("core", "extended")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestInfo:
    """One test of the kit.

    Attributes:
        name: as used in rows, options and method names.
        variants: ``untied`` and ``tied``, or ``default`` (the model type's own value).
        needs: capabilities without which the test is not applicable.
        summary: one line for lists.
        tier: one of `TIERS`.
        ranks: of its largest job.
    """

    __test__ = False  # pytest must not collect it

    name: str
    variants: tuple[str, ...]
    needs: frozenset[str]
    summary: str
    tier: str = "core"
    ranks: int = 2


#: Tests whose largest job has more than two ranks.
_RANKS = {"hsdp_vs_ddp": 4, "save_load": 3, "dcp": 4, "mesh_shapes": 3, "adapters": 3}


def _info(name: str, variants: tuple[str, ...], needs: str, summary: str, tier: str = "core") -> TestInfo:
    return TestInfo(
        name=name,
        variants=variants,
        needs=frozenset(needs.split()),
        summary=summary,
        tier=tier,
        ranks=_RANKS.get(name, 2),
    )


def _extended(name: str, variants: tuple[str, ...], needs: str, summary: str) -> TestInfo:
    return _info(name, variants, needs, summary, "extended")


DEFAULT = ("default",)
TESTS: dict[str, TestInfo] = {
    info.name: info
    for info in (
        _info(
            "sharding_structure",
            BOTH,
            "auto_plan",
            "units, placements, local shapes, ties; 2 real ranks, 3, 8, 2x4 claimed",
        ),
        _info(
            "buffers_dtypes", ("default",), "auto_plan", "buffers bit-equal on all ranks and to a fresh model; dtypes"
        ),
        _info("auto_vs_ddp", BOTH, "auto_plan", "losses, gradients, norms, weights, optimizer state vs truth and DDP"),
        _info(
            "manual_vs_ddp",
            BOTH,
            "manual_plan reshard_per_module",
            "the same under a manual plan with frozen parameters",
        ),
        _info("hsdp_vs_ddp", BOTH, "auto_plan hsdp", "the same on 2 x 2 ranks; replicas bit-equal after every step"),
        _info(
            "save_load", BOTH, "safetensors", "train, save, open the files, reload on 2 and 3 ranks and in one process"
        ),
        _info("dcp", ("default",), "dcp", "DCP save at 2 ranks, load at 1, 2, 4 and 2 x 2"),
        _info("resume", ("default",), "resume dcp", "interrupted and resumed equals uninterrupted, dropout on"),
        _info("meta_init", ("default",), "meta_init", "no rank builds or initialises a full model in vain"),
        _extended(
            "accumulation",
            BOTH,
            "auto_plan gradient_sync",
            "three micro-batches, reduced once or each time; six parameter groups, every step clipped",
        ),
        _extended(
            "mesh_shapes",
            BOTH,
            "auto_plan hsdp",
            "training on 1 rank, on 3, and on 1 x 2 and 2 x 1 meshes, vs truth and DDP",
        ),
        _extended(
            "adapters",
            DEFAULT,
            "auto_plan",
            "low-rank adapters of 1, w - 1 and w + 1 rows beside frozen weights, on 3 ranks",
        ),
        _extended(
            "checkpointing",
            DEFAULT,
            "auto_plan activation_checkpointing",
            "activation checkpointing with dropout: recomputed masks are the same",
        ),
        _extended("evaluation", DEFAULT, "auto_plan", "evaluation between training steps changes no state"),
        _extended(
            "mixed_precision",
            DEFAULT,
            "auto_plan mixed_precision",
            "bf16 compute, fp32 reduction, modules kept in fp32",
        ),
        _extended(
            "cpu_offload",
            DEFAULT,
            "auto_plan cpu_offload gradient_sync",
            "offloaded parameters, two micro-batches a step",
        ),
        _extended("idle_experts", DEFAULT, "auto_plan", "experts that get tokens on some ranks only"),
        _extended("repeated_saving", DEFAULT, "safetensors", "eight saves and loads in a process: no drift, no growth"),
        _extended(
            "offloaded_save", DEFAULT, "safetensors cpu_offload", "offloaded parameters trained, saved and loaded again"
        ),
        _extended(
            "save_over", DEFAULT, "safetensors", "a save over the folder that was loaded from, and training goes on"
        ),
        _extended(
            "reshard_resume",
            DEFAULT,
            "dcp resume hsdp",
            "training state saved on 4 ranks, restored on 1, 2, 3 and 2 x 2",
        ),
        _extended("lone_save", DEFAULT, "safetensors", "a save that one rank alone calls works or is refused"),
        _extended(
            "two_forwards",
            DEFAULT,
            "manual_plan reshard_per_module activation_checkpointing",
            "two forwards before each backward, with nested units and recomputation",
        ),
        _extended(
            "nonfinite_guard", DEFAULT, "auto_plan nonfinite_guard", "NaN in one rank's gradient: every rank refuses it"
        ),
    )
}


def of_tier(tier: str) -> tuple[str, ...]:
    """Return the names of the tests that run in a tier: ``extended`` holds ``core``."""
    return tuple(info.name for info in TESTS.values() if info.tier == "core" or tier == "extended")
