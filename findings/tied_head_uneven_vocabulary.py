"""Tied head, vocabulary that does not divide by the ranks: the head trains on stale rows, silently.

Two ranks train a tied Llama on halves of each batch; one process trains on the whole batch. Vocabulary 32
agrees, 33 does not: the head that the forward uses is no longer the embedding that the optimizer updates.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def train(model: torch.nn.Module, batches: list[torch.Tensor]) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1.0), []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def rank_main(rank: int, folder: str, vocabulary: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    batches = torch.load(f"{folder}/batches.pt")
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    losses = torch.tensor(train(model, [batch[rank::2] for batch in batches]))
    dist.all_reduce(losses)
    embedding = model.model.embed_tokens.weight.full_tensor()
    model.unshard()  # the root unit: what the forward multiplies by
    gap = (model.lm_head.weight - embedding).abs().max().item()
    if rank == 0:
        truth = train(LlamaForCausalLM.from_pretrained(folder), batches)
        actual = [round(loss, 4) for loss in (losses / 2).tolist()]
        print(f"vocabulary {vocabulary} on 2 ranks\n  loss, one process {[round(loss, 4) for loss in truth]}")
        print(f"  loss, two ranks   {actual}\n  |head in forward - embedding| = {gap:.4f}", flush=True)
        torch.save(gap > 1e-5 or abs(actual[-1] - truth[-1]) > 1e-3, f"{folder}/wrong.pt")
    dist.barrier()  # nobody leaves before all is printed
    dist.destroy_process_group()


def main() -> int:
    wrong = False
    for vocabulary in (32, 33):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(config).save_pretrained(folder)
            torch.save([torch.randint(0, vocabulary, (4, 8)) for _ in range(4)], f"{folder}/batches.pt")
            mp.spawn(rank_main, args=(folder, vocabulary), nprocs=2)
            wrong = wrong or torch.load(f"{folder}/wrong.pt")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
