"""The rules: which evidence speaks for which cause. Data only; what marks and signs mean is in `view`.

A rule picks the findings of its checks that carry its words, all of its marks and none of those it excludes. It
fits where it picked any and all its signs hold. The smaller its place, the nearer its evidence is to a cause: a
lost tie explains a wrong gradient, and a wrong gradient a wrong loss, but not the other way round.
"""

from __future__ import annotations

from fsdp_testkit.diagnosis.rule import Rule, rule
from fsdp_testkit.diagnosis.view import NUMERIC

#: What a load says that costs too much.
WASTE = "init calls|allocated|grew by|outlive the load|bytes of weight files"
NUMBERS = ", ".join(NUMERIC)

RULES: tuple[Rule, ...] = (
    # a number that fp64 clears is no bug of logic
    rule(
        5, "rounding only", NUMBERS, "{names} on {ranks}: off by {error} at most, and in fp64 the runs agree",
        signs="rounding",
    ),
    # what the model is made of
    rule(10, "tie lost", "ties", "{message}, on {ranks}", words="no longer one object"),
    rule(12, "wrapped twice", "structure", "{message}, on {ranks}", words=r"belongs to ([2-9]|\d\d+) FSDP"),
    rule(
        14, "padded rows lost", "structure", "{names}: a global shape of {actual} instead of {expected}, on {ranks}: "
        "made from the local rows",
        words="global shape", marks="uneven tensor",
    ),
    rule(
        16, "switch without effect", "structure", "{message} where {expected} was asked for: the same as "
        "plain sharding over all ranks",
        words=r"lies as \['S0'\] on a mesh of \[\d+\]$", marks="two axes",
    ),
    rule(
        18, "reduced over the wrong group", "structure", "{message} where {expected} was asked for",
        words="lies as",
    ),
    rule(20, "key missing or extra in a file", "files", "{message}", without="dtype"),
    rule(22, "trained set changed", "structure, dtypes", "{message}, on {ranks}", words="requires_grad="),
    rule(23, "trained set changed", "buffers", "{message}, on {ranks}", words="names changed"),
    rule(24, "wrong dtype", "dtypes, buffers", "{names}: {actual} instead of {expected} on {ranks}", marks="dtype"),
    rule(24, "wrong dtype", "precision", "{message}, on {ranks}"),
    rule(25, "wrong dtype", "files", "{names}: stored as {actual} instead of {expected}", marks="dtype"),
    rule(
        26, "wrong dtype", "initial_weights, buffers, reload", "{names}: the right values, rounded to bf16, on {ranks}",
        marks="bf16",
    ),
    rule(
        28, "buffer not filled", "buffers", "{names} on {ranks} {holds} instead of {expected}: memory that nothing "
        "filled",
        marks="lost",
    ),
    rule(28, "buffer not filled", "buffers, meta_init", "{message}, on {ranks}", words="buffer.* on the meta device"),
    rule(
        30, "buffer differs between ranks", "buffers", "{names} on {ranks}: {actual} instead of {expected}; on the "
        "other ranks it is right",
        words="differs from", without="lost, bf16, dtype", signs="some ranks",
    ),
    rule(
        31, "buffer not filled", "buffers", "{names} is wrong on {ranks}: {actual} instead of {expected}",
        words="differs from", without="lost, bf16, dtype", unless="some ranks",
    ),
    # what a load left in the weights
    rule(
        32, "padded rows lost", "initial_weights, reload", "{names}: rows {rows} of {of} are wrong on {ranks}; these "
        "tensors do not divide evenly",
        marks="last rows", without="moved", signs="all",
    ),
    rule(
        33, "wrong slice", "initial_weights, reload", "{names} on {ranks}: values of other places of the same tensor",
        marks="moved",
    ),
    rule(
        33, "wrong slice", "reload", "{names}: the file holds the rows of the first rank's shard, and wrong ones in "
        "rows {rows} of {of}",
        marks="other shards",
    ),
    rule(
        35, "replica diverged", "initial_weights", "{names} on {ranks} are not those of the other replica, right "
        "after loading",
        without="lost, moved, bf16", signs="one replica",
    ),
    rule(
        36, "weight not loaded", "initial_weights, reload", "{names} on {ranks} {holds} after loading: nothing filled "
        "them",
        marks="lost", without="other shards",
    ),
    rule(
        37, "weight not loaded", "initial_weights", "{names} on {ranks} are not what the checkpoint holds: {wrong} of "
        "the values differ",
        without="lost, moved, bf16, last rows",
    ),
    rule(37, "weight not loaded", "structure, meta_init", "{message}, on {ranks}", words="on the meta device"),
    # what is trained
    rule(
        39, "trained set changed", "gradients", "{names} on {ranks}: a gradient where the model has none",
        words="has a gradient", at_first=True,
    ),
    rule(
        40, "optimizer on other tensors", "optimizer_binding", "{message}, on {ranks}",
        words="not the model's parameters|groups hold other",
    ),
    rule(42, "trained set changed", "movement", "{message}, on {ranks}", words="moved although"),
    # gradients, at the first wrong step
    rule(
        44, "norm of one rank", "gradient_norm", "the norm on {ranks} is that of each rank's own shards: {actual} "
        "instead of {expected}",
        signs="norm of shards",
    ),
    rule(
        45, "RNG not restored", "losses", "from step {step} on, the losses are those that the random numbers of the "
        "first step give: the generator does not advance",
        signs="as first",
    ),
    rule(
        46, "never reduced", "gradients", "gradients of {names} on {ranks} are made of that rank's own data alone "
        "({parts} of the right shares of the ranks)",
        marks="own data", at_first=True,
    ),
    rule(
        47, "reduced over the wrong group", "gradients", "gradients of {names} on {ranks} hold the data of some ranks "
        "only ({parts} of the right shares)",
        marks="some ranks", at_first=True,
    ),
    rule(
        48, "collective mismatch", "gradients", "the gradient of {names} on {ranks} is the right one of `{other}`: "
        "ranks reduce in different orders",
        marks="another's", at_first=True,
    ),
    rule(
        49, "gradient part lost", "gradients", "gradients of {names} on {ranks} lack a micro-batch ({parts} of the "
        "right shares)",
        marks="micro-batch missing", at_first=True,
    ),
    rule(
        50, "switch without effect", "gradients", "gradients of {names} on {ranks} are {factor} x the expected in "
        "step {step}, which is the norm over its bound: clipping did nothing",
        marks="multiple, unclipped", at_first=True,
    ),
    rule(
        51, "wrong normaliser", "gradients", "gradients of {names} on {ranks} are {factor} x the expected in step "
        "{step}, just the number of tokens: sums were not divided",
        marks="multiple, tokens", at_first=True,
    ),
    rule(
        51, "wrong normaliser", "gradients", "gradients of {names} on {ranks} are {factor} x the expected in step "
        "{step}, just one over the number of tokens: means were divided once more",
        marks="multiple, per token", at_first=True,
    ),
    rule(
        52, "wrong normaliser", "gradients", "gradients of {names} on {ranks} weigh the ranks' and micro-batches' "
        "data by {parts} of the right shares in step {step}",
        marks="uneven", at_first=True,
    ),
    rule(
        53, "wrong factor", "gradients", "gradients of {names} on {ranks} are {factor} x the expected from step {step}",
        marks="multiple", without="tokens, per token, unclipped", at_first=True,
    ),
    rule(
        54, "gradient part lost", "gradients", "{names} on {ranks}: no gradient, from step {step} on",
        marks="none", at_first=True,
    ),
    # what the forward computed with
    rule(
        56, "forward reads other weights", "losses", "from step {step} on, the losses are those of the weights as they "
        "were loaded",
        signs="as initial",
    ),
    rule(
        57, "RNG not restored", "gradients", "with dropout, the losses of step {step} are right and the gradients of "
        "{names} are not: the backward saw other masks",
        marks="mixture", signs="losses right, dropout", at_first=True,
    ),
    rule(
        58, "wrong dtype", "losses, gradients", "from the first step on, losses or gradients of {names} are off by "
        "{error} at most on {ranks}, and as much in fp64: something inside the forward is rounded to a narrow dtype",
        marks="size of bf16", signs="first step, weights right, all at first", unless="rounding", at_first=True,
    ),
    rule(
        59, "replica diverged", "replicas", "{names} on {ranks} differ from their replica from step {step} on, while "
        "the gradients are still right",
        signs="before",
    ),
    rule(
        60, "optimizer on other tensors", "movement", "{message}, on {ranks}",
        words="did not move",
    ),
    rule(
        61, "forward reads other weights", "losses", "step 0 is right, the weights move, and from step {step} on the "
        "losses on {ranks} are wrong: the forward does not see all updates",
        signs="later",
    ),
    rule(
        63, "gradient part lost", "gradients", "gradients of {names} on {ranks} are no mixture of the ranks' own ones "
        "({parts_rest} is left beside), while the losses are right: a path is missing",
        marks="mixture", signs="first step, losses right", at_first=True,
    ),
    # resuming
    rule(64, "state not restored", "restored_optimizer", "{message}, on {ranks}"),
    rule(
        65, "state not restored", "resumed_lrs", "learning rates on {ranks} are {actual} instead of {expected} at step "
        "{step}, after resuming",
    ),
    rule(66, "RNG not restored", "resumed_rng", "{message}, on {ranks}"),
    rule(
        67, "state not restored", "resumed_optimizer", "the first losses and gradients after resuming are right, and "
        "{names} are not: the update used another state, on {ranks}",
        signs="first resumed right",
    ),
    rule(
        68, "weight not loaded", "resumed_losses", "the first losses after resuming are {actual} instead of {expected} "
        "on {ranks}, and the random numbers are right: other weights",
        unless="first resumed right, random numbers",
    ),
    rule(
        68, "weight not loaded", "reload, drift", "{message}, on {ranks}",
        without="moved, lost, bf16, last rows, other shards",
    ),
    rule(69, "replica diverged", "replicas", "{names} on {ranks} differ from their replica from step {step} on"),
    # units: they change what a step costs, not its numbers
    rule(
        70, "not wrapped", "structure", "{message}, on {ranks}",
        words="no FSDP unit|belongs to 0 FSDP|not an FSDP unit|not one FSDP unit|does not exist|matches no module",
    ),
    rule(70, "not resharded", "reshard", "{message}, on {ranks}"),
    # a job that failed: the words are those of torch's and Python's own errors
    rule(
        70, "wrapped twice", "ranks", "{failure}",
        words=r"already managed|already been (sharded|applied)|shared (parameter|by)|more than one (FSDP|unit|group)|"
        r"multiple (FSDP|parameter) groups",
    ),
    rule(
        71, "wrong dtype", "ranks", "{failure}",
        words=r"uniform original parameter dtype|same dtype|dtype.*(mismatch|but got)|"
        r"saved metadata: .*'dtype': (\S+)(?s:.)*recomputed metadata: .*'dtype': (?!\2)",
    ),
    rule(72, "not wrapped", "ranks", "{failure}", words="requires a single root module"),
    rule(72, "forward reads other weights", "ranks", "{failure}", words=r"mixed torch\.Tensor and DTensor"),
    rule(
        73, "collective mismatch", "ranks", "{failure}",
        words="mismatch between collectives|collective mismat|data size doesn't match",
    ),
    rule(74, "collective mismatch", "ranks", "{failure}", words="waits in", signs="different collectives"),
    rule(75, "rank stuck", "ranks", "{failure}", words="no reply|waits in"),
    rule(76, "rank died", "ranks", "{failure}"),
    # switches, and what is right and costs too much
    rule(78, "switch without effect", "reductions, recomputation, guard", "{message}, on {ranks}"),
    rule(79, "switch without effect", "meta_init", "{message}, on {ranks}", words="was not set during the load"),
    rule(
        80, "switch without effect", "meta_init", "{message}: what loading the whole model takes, on {ranks}",
        marks="whole model", signs="every rank",
    ),
    rule(82, "memory held", "meta_init", "{message}, on {ranks}", words=WASTE),
    rule(82, "memory held", "traffic, growth", "{message}, on {ranks}"),
)  # fmt: skip
