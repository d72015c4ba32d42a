"""Tied head, vocabulary that does not divide by the ranks: the head trains on stale rows, silently."""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig


def train(model: torch.nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1.0), []
    for ids in batches:
        optimizer.zero_grad()
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def rank_main(rank: int, folder: str, vocabulary: int, batches: list[torch.Tensor]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    truth = train(LlamaForCausalLM.from_pretrained(folder), batches)  # one process trains on the whole batch
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    actual = train(model, [batch[rank::2] for batch in batches]) / 2  # two ranks train on halves of it
    torch.distributed.all_reduce(actual)
    model.unshard()  # the root unit, whose head the forward multiplies by; the embedding is what the optimizer updates
    gap = (model.lm_head.weight - model.model.embed_tokens.weight.full_tensor()).abs().max().item()
    if rank == 0:
        print(f"vocabulary {vocabulary} on 2 ranks\n  loss, one process {[round(loss, 4) for loss in truth.tolist()]}")
        print(f"  loss, two ranks   {[round(loss, 4) for loss in actual.tolist()]}")
        print(f"  |head in forward - embedding| = {gap:.4f}")
    torch.save(gap > 1e-5 or bool((actual - truth).abs()[-1] > 1e-3), f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wrong = False
    for vocabulary in (32, 33):  # 32 agrees, 33 does not
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=True)
            LlamaForCausalLM(config).save_pretrained(folder)
            batches = [torch.randint(0, vocabulary, (4, 8)) for _ in range(4)]
            torch.multiprocessing.spawn(rank_main, args=(folder, vocabulary, batches), nprocs=2)
            wrong = wrong or any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2))
    sys.exit(wrong)
