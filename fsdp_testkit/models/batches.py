"""Batches: different for every rank, step and micro-batch, with unequal numbers of valid tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fsdp_testkit.models import rules
from fsdp_testkit.models.build import number_from
from fsdp_testkit.models.overrides import OVERRIDES

#: Label that losses ignore.
IGNORED = -100
#: A model class may have a static method of this name, ``(config, inputs, generator) -> dict``, whose result is
#: added to the inputs: that is how somebody's own model gets what it needs beyond ids and labels.
HOOK = "fsdp_testkit_inputs"
#: Further ignored labels of a rank: ``(3 * rank + step + micro) % SPREAD``, different for up to 11 ranks.
SPREAD = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward/backward of one rank.

    Attributes:
        inputs: keyword arguments of the model's forward, labels included; all on the CPU.
        tokens: number of label positions that the model's own mean loss averages over.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int


def make_batch(
    config: Any,
    model_class: Any,
    *,
    rank: int,
    step: int,
    micro: int,
    seed: int,
    batch_size: int = 2,
    length: int = 16,
    few: int | None = None,
) -> Batch:
    """Return the batch of one rank, step and micro-batch: a function of the arguments alone.

    Labels equal the input ids, except that the first position of every row is ignored. A model that shifts
    labels drops that position anyway, so the number of valid tokens is the same whether it shifts or not.
    Further positions are ignored in a number that depends on rank, step and micro-batch.

    Args:
        config: config of the model; its vocabulary bounds the ids.
        model_class: class of the model; its `HOOK`, where it has one, adds inputs.
        rank: global rank whose data this is.
        step: optimizer step, from 0.
        micro: micro-batch within the step, from 0.
        seed: of the case.
        batch_size: rows.
        length: tokens in each row.
        few: where given, all of a rank's words of one step are one or two ids, others for each rank and value of
            ``few``: experts then get tokens on some ranks only.
    """
    generator = torch.Generator().manual_seed(number_from("batch", seed, rank, step, micro))
    words = min(vocabulary(config), rules.FIRST_PLACEHOLDER)
    first = min(rules.FIRST_WORD, words - 2)
    ids = torch.randint(first, words, (batch_size, length), generator=generator)
    if few is not None:
        chosen = torch.tensor([(7 * rank + 3 * step + 11 * few + pick) % (words - first) for pick in (0, 5)])
        ids = first + chosen[ids % 2]
    labels = ids.clone()
    labels[:, 0] = IGNORED
    free = batch_size * (length - 1)
    ignored = min((3 * rank + step + micro) % SPREAD, free - 1)
    chosen = torch.randperm(free, generator=generator)[:ignored]
    labels[chosen // (length - 1), 1 + chosen % (length - 1)] = IGNORED
    inputs = {"input_ids": ids, "labels": labels}
    override = OVERRIDES.get(getattr(config, "model_type", ""))
    hook = getattr(model_class, HOOK, None) or (override.inputs if override is not None else None)
    if hook is not None:
        inputs.update(hook(config, inputs, generator))
    return Batch(inputs=inputs, tokens=int((inputs["labels"] != IGNORED).sum()))


def vocabulary(config: Any) -> int:
    """Return the number of token ids of a config, looking into its text part where it has one."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int):
            return size
    return rules.VOCAB
