"""XLNet's constructor ignores the meta device: ranks keep that memory beside their shards until the first forward."""

import gc
import sys
import tempfile

import torch
from transformers import XLNetConfig, XLNetLMHeadModel
from transformers.distributed import DistributedConfig


def held(model: XLNetLMHeadModel) -> int:
    """Bytes of tensors in memory (address 0 is not) that are no shard of a parameter; the model has no buffers."""
    gc.collect()
    shards = {weight.to_local().untyped_storage().data_ptr() for weight in model.parameters()}
    found = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.data_ptr(): each.nbytes() for each in found if each.data_ptr() not in {0, *shards}}.values())


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = XLNetLMHeadModel.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    loaded = held(model)
    model(input_ids=torch.arange(8).view(1, 8))
    model.reshard()
    if rank == 0:
        print(f"held beside the model: {loaded:,} bytes after the load, {held(model):,} after a forward and reshard()")
    torch.save(loaded > 10_000, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config = XLNetConfig(vocab_size=32, d_model=64, n_layer=2, n_head=2, d_inner=64)
    with torch.device("meta"):
        real = [weight.nbytes for weight in XLNetLMHeadModel(config).parameters() if not weight.is_meta]
    print(f"on the meta device: {len(real)} parameters of {sum(real):,} bytes are in memory")
    with tempfile.TemporaryDirectory() as folder:
        XLNetLMHeadModel(config).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
