"""XLNet's constructor ignores the meta device: ranks keep that memory beside their shards until the first forward."""

import gc
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import XLNetConfig, XLNetLMHeadModel
from transformers.distributed import DistributedConfig


def held(model: XLNetLMHeadModel) -> int:
    """Bytes of tensors in memory that are no parameter or buffer of the model."""
    gc.collect()
    own = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage().data_ptr() for t in own}
    found = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in found if s.data_ptr() and s.data_ptr() not in storages}.values())


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = XLNetLMHeadModel.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    loaded = held(model)
    with torch.no_grad():
        model(input_ids=torch.arange(8).view(1, 8))
    model.reshard()
    if rank == 0:
        after = f"{held(model):,} after a forward and reshard()"
        print(f"held beside the model: {loaded:,} bytes after the load, {after}", flush=True)
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()
    sys.exit(int(loaded > 10_000))


def main() -> int:
    config = XLNetConfig(vocab_size=32, d_model=64, n_layer=2, n_head=2, d_inner=64)
    with torch.device("meta"):
        real = [p for p in XLNetLMHeadModel(config).parameters() if not p.is_meta]
    print(f"on the meta device: {len(real)} parameters of {sum(p.nbytes for p in real):,} bytes are in memory")
    with tempfile.TemporaryDirectory() as folder:
        XLNetLMHeadModel(config).save_pretrained(folder)
        try:
            mp.spawn(rank_main, args=(folder,), nprocs=2)
        except mp.ProcessExitedException as error:
            return int(error.exit_code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
