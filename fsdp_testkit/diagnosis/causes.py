"""The closed list of causes: what evidence shows each one, and what to look at first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """A kind of bug.

    Attributes:
        evidence: what shows it, in one phrase.
        advice: what a person looks at first, as a question or an order.
        near: the cause that it is easily mixed up with, and what tells them apart; ``("", "")`` where none is.
    """

    evidence: str
    advice: str
    near: tuple[str, str] = ("", "")


CAUSES: dict[str, Cause] = {
    "never reduced": Cause(
        "a rank's gradient is its own data's alone",
        "Is the module its own FSDP unit, or left out as ignored? Does its forward bypass the hooks, or does "
        "set_requires_gradient_sync(False) stay on?",
        ("tie lost", "there the embedding's gradient lacks one use on all ranks alike"),
    ),
    "reduced over the wrong group": Cause(
        "tensors lie on, or sums run over, other ranks than the layout says",
        "Print the mesh that is passed: its axes must be (replicate, shard) in this order, with the sizes asked for.",
    ),
    "wrong factor": Cause(
        "gradients are a fixed multiple of the right ones",
        "Who divides by the number of ranks: the loss, the wrapper, or both? Look at the divide factor and at sums "
        "where means are meant.",
        ("wrong normaliser", "there the ratio changes with the number of tokens, here it does not"),
    ),
    "wrong normaliser": Cause(
        "gradients are off by ratios that change with the number of tokens",
        "Divide each loss by the tokens of all ranks and micro-batches of the step, and undo the wrapper's mean.",
        ("wrong factor", "there the ratio is the same whatever the number of tokens"),
    ),
    "gradient part lost": Cause(
        "a gradient is missing, or lacks a micro-batch or a path",
        "Look for a detach or no_grad on the path, and for gradients that are replaced or zeroed between "
        "micro-batches.",
        ("trained set changed", "there requires_grad differs from the model's"),
    ),
    "norm of one rank": Cause(
        "a norm was taken over one rank's shards",
        "Sum the squares over the shard axis before the root: call full_tensor() on the norm before item().",
    ),
    "tie lost": Cause(
        "names that shared one parameter have two",
        "Tie the weights again after materialising, and before sharding and before the optimizer is built.",
        ("never reduced", "there each rank has its own gradient, here all ranks lack the same part"),
    ),
    "buffer not filled": Cause(
        "a buffer holds memory that nothing wrote, or zeros",
        "Non-persistent buffers are in no state dict: compute them again, or broadcast them, after to_empty().",
        ("weight not loaded", "there it is a parameter that the file holds"),
    ),
    "buffer differs between ranks": Cause(
        "a buffer is right on some ranks only",
        "Broadcast buffers from one rank, or compute them the same way on all of them.",
        ("buffer not filled", "there the values are poison, zeros or one constant"),
    ),
    "weight not loaded": Cause(
        "a weight after loading is not what the file holds",
        "Is the key in the file, and is it assigned on this rank? Does an init function run after the load?",
        ("buffer not filled", "there it is a buffer, which the file may not hold at all"),
    ),
    "wrong slice": Cause(
        "a shard holds values of another place of the same tensor",
        "Take rows by the shard coordinate of the mesh, not by the global rank, and gather before splitting or saving.",
        ("weight not loaded", "there the values are nowhere in the right tensor"),
    ),
    "padded rows lost": Cause(
        "the last rows of a tensor that does not divide evenly are wrong",
        "Pass shape and stride wherever a sharded tensor is made, and cut by ceil(rows / shards) like torch.chunk.",
        ("wrong slice", "there also tensors that divide evenly are wrong"),
    ),
    "replica diverged": Cause(
        "ranks that should hold equal bits do not",
        "Broadcast the start over the replicate axis, and look for updates or random numbers that depend on the rank.",
    ),
    "trained set changed": Cause(
        "other tensors are parameters, or trainable, than in the model",
        "Keep requires_grad and the kind (parameter or buffer) of each tensor when it is made anew.",
        ("optimizer on other tensors", "there the model is right and the optimizer's list is not"),
    ),
    "optimizer on other tensors": Cause(
        "the optimizer holds objects that are not the model's, or other groups of them",
        "Build the optimizer after sharding and after the last cast, from model.named_parameters().",
        ("forward reads other weights", "there the optimizer moves the model's weights and forwards do not see it"),
    ),
    "state not restored": Cause(
        "optimizer or scheduler after a resume are not what was saved",
        "Look whether the file holds the state, under which name it is looked for, and what a missing one does.",
        ("RNG not restored", "there the state is right and only what is drawn differs"),
    ),
    "RNG not restored": Cause(
        "random numbers after a resume or in a recomputation are not those of the plain run",
        "Save and restore each rank's generators, keep preserve_rng_state on, and let generators advance.",
    ),
    "forward reads other weights": Cause(
        "a forward computes with something else than the gathered, current weights",
        "Call modules, not their forward; look for copies of weights that are taken once, and for hooks that are "
        "bypassed.",
        ("optimizer on other tensors", "there the weights of the model do not move"),
    ),
    "wrong dtype": Cause(
        "a tensor is kept, computed or stored in another dtype than declared",
        "Look for blanket casts, casts bound to a local name, and modules or buffers that have to stay in fp32.",
        ("rounding only", "there fp64 agrees, here a narrow dtype stays narrow in every run"),
    ),
    "key missing or extra in a file": Cause(
        "a saved folder has other keys or shapes than a single-process save",
        "Compare the keys with a single-process save_pretrained: gather first, drop aliases, strip wrappers' names.",
    ),
    "not wrapped": Cause(
        "a module is not the FSDP unit that the plan makes it",
        "Is fully_shard called on this module, and before its parent? Does the class name in the plan match?",
        ("wrapped twice", "there a parameter has more than one unit, here none or another one"),
    ),
    "wrapped twice": Cause(
        "a parameter belongs to two units, or is taken to",
        "Put modules that share a parameter into one fully_shard([...]) call.",
    ),
    "not resharded": Cause(
        "weights stay gathered, or are freed, against the plan",
        "Look at reshard_after_forward of this unit; the root is special.",
    ),
    "memory held": Cause(
        "a load allocates or initialises what the rank does not keep",
        "Build on the meta device on every rank and read only the rows that this rank keeps.",
        ("switch without effect", "there all ranks do the whole load, as if the switch were off"),
    ),
    "switch without effect": Cause(
        "an option is accepted and changes nothing",
        "Follow the option from where it is set to where it is read; an unknown value has to be refused.",
    ),
    "collective mismatch": Cause(
        "ranks enter different collectives",
        "Look for branches that depend on data or rank around modules and collectives; all ranks enter all units.",
        ("rank stuck", "there the ranks that are waited for entered no collective of that group"),
    ),
    "rank died": Cause(
        "one rank raised or died; the others only show it",
        "Read the first failing rank's own error; what the others say follows from it.",
    ),
    "rank stuck": Cause(
        "a rank waits for something that never comes",
        "Let all ranks enter the collective, in the same order of groups, or none.",
        ("collective mismatch", "there the other ranks wait in a collective of their own"),
    ),
    "rounding only": Cause(
        "only the low bits differ: in fp64 the runs agree",
        "Look for sums kept in a narrower dtype than the weights; if the size is harmless, widen nothing.",
        ("wrong dtype", "there the difference is as large in fp64"),
    ),
}
