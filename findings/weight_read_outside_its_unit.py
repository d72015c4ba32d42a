"""A weight that another module's forward reads is not gathered there: the first forward of Gemma 4 fails."""

import sys
import tempfile

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.distributed import DistributedConfig


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = torch.arange(5, 13).view(1, 8)
    expected = Gemma4ForConditionalGeneration.from_pretrained(folder)(input_ids=ids, labels=ids).loss.item()
    config = DistributedConfig(fsdp_size=2)
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, distributed_config=config)
    name = "model.language_model.embed_tokens"
    try:
        actual, wrong = f"{model(input_ids=ids, labels=ids).loss.item():.4f}", False
    except RuntimeError as error:
        actual, wrong = f"{type(error).__name__}: {str(error)[:75]}", True
    if rank == 0:
        print(f"{name} is a unit: {type(model.get_submodule(name)).__name__}")
        print(f"loss: expected {expected:.4f}, actual {actual}")
    torch.save(wrong, f"{folder}/wrong{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "global_head_dim": 8, "vocab_size_per_layer_input": 32}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 4}
    others = {"vision_config": None, "audio_config": None, "tie_word_embeddings": False}
    others |= {"image_token_id": 31, "video_token_id": 30, "audio_token_id": 29}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, **others)).save_pretrained(folder)
        torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=2)
        sys.exit(any(torch.load(f"{folder}/wrong{rank}.pt") for rank in range(2)))
