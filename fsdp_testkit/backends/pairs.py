"""DDP's average over ranks in an order that is known.

No postponed annotations here: DDP compares those of a hook with the classes that it expects.
"""

import torch
import torch.distributed as dist


def average_in_pairs(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of DDP's over all ranks: ranks in pairs, then pairs of pairs.

    An all-reduce adds in an order of its own, which differs between elements (a ring begins each part at another rank).
    With more than two ranks that is rounding, which a model may amplify in the steps that follow until only fp64 can
    tell it from a fault. In pairs, DDP adds as truth does, and as a mesh of two axes of two ranks does.

    A communication hook (https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html).
    """
    del state
    own = bucket.buffer()
    world = dist.get_world_size()
    found = own.new_empty((world, own.numel()))
    # waited for here, not in the future of the work: on a GPU gloo's does not wait for the copy to it
    dist.all_gather_single(found.view(-1), own)
    parts = list(found.unbind())
    while len(parts) > 1:
        last = parts[len(parts) // 2 * 2 :]  # without a partner
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=False)] + last
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[own.device] if own.is_cuda else None)
    done.set_result(own.copy_(parts[0]).div_(world))
    return done
