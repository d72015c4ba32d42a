"""What every rank of a model would do first, done once where ranks are forked from."""

from __future__ import annotations

import functools
import linecache
import sys

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from fsdp_testkit.backends.ddp import remember_frozen
from fsdp_testkit.backends.rehearsal import read_sources, rehearse
from fsdp_testkit.core.case import Case
from fsdp_testkit.models.build import meta_model
from fsdp_testkit.scenarios.common import resolved, tree_of
from fsdp_testkit.scenarios.reading import find_readers


def model(*, case: str) -> None:
    """Import a case's modeling module, build its config and its module tree, and fill torch's and transformers' caches.

    Sharded training is rehearsed with the first model.
    """
    spec = Case.from_json(case).model
    config, model_class = resolved(spec)
    get_checkpoint_conversion_mapping(config.model_type)
    facts = tree_of(spec)["parameters"]
    if not spec.adapters:
        remember_frozen(model_class, config, [name for name in facts if not facts[name]["requires_grad"]])
    if model_class not in _read:
        _read.add(model_class)
        read_sources(meta_model(spec))
    find_readers()
    _rehearse_once()
    _keep_sources(sys.modules[model_class.__module__].__file__)


def _keep_sources(*files: str | None) -> None:
    """Read the lines of ``files``, of `_TRACED` and of those that are known already, once and for all.

    Whenever DTensor works out a kind of call it takes a stack trace (``FakeTensorMode``), and each trace looks at the
    disk whether the sources of all its frames are what they were, and reads those that it has not seen.
    """
    traced = (getattr(module, "__file__", None) for name, module in [*sys.modules.items()] if name.startswith(_TRACED))
    for file in {*files, *traced, *linecache.cache}:
        if file and (lines := linecache.getlines(file)):
            # without a time, as what comes from a loader has none, linecache does not look again
            linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


#: Modules whose code is in the traces of a training.
_TRACED = (
    "fsdp_testkit.backends",
    "fsdp_testkit.ranks",
    "fsdp_testkit.reference",
    "fsdp_testkit.scenarios",
    "torch.optim.lr_scheduler",
)
_rehearse_once = functools.cache(rehearse)
#: Classes whose sources were read.
_read: set[type] = set()
