"""The tests, their variants and what a backend must be able to express. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("untied", "tied")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestInfo:
    """One test of the kit.

    Attributes:
        name: as used in rows, options and method names.
        variants: ``untied`` and ``tied``, or ``default`` (the model type's own value).
        needs: capabilities without which the test is not applicable.
        summary: one line for lists.
    """

    __test__ = False  # pytest must not collect it

    name: str
    variants: tuple[str, ...]
    needs: frozenset[str]
    summary: str


def _info(name: str, variants: tuple[str, ...], needs: str, summary: str) -> TestInfo:
    return TestInfo(name=name, variants=variants, needs=frozenset(needs.split()), summary=summary)


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
    )
}
