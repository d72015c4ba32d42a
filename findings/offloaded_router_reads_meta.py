"""LongCat-Flash with weights on disk routes its tokens by uninitialised memory: the router reads a meta weight."""

import sys
import tempfile

import torch
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
sizes |= {"ffn_hidden_size": 48, "q_lora_rank": 16, "kv_lora_rank": 8, "v_head_dim": 8}
sizes |= {"head_dim": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
sizes |= {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32}
torch.manual_seed(0)
ids, scores, logits = torch.arange(12).view(1, 12), [], []
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    LongcatFlashForCausalLM(LongcatFlashConfig(**sizes)).save_pretrained(folder)
    for devices in ({}, {"device_map": {"": "disk"}, "offload_folder": f"{folder}/offload"}):
        model = LongcatFlashForCausalLM.from_pretrained(folder, **devices)
        model.model.layers[0].mlp.router.register_forward_hook(lambda _, __, output: scores.append(output[0]))
        logits.append(model(input_ids=ids).logits)
for place, score in zip(("in memory", "on disk"), scores, strict=True):
    print(f"weights {place}: router's scores of the first token {[f'{value:.2e}' for value in score[0].tolist()]}")
print(f"logits: largest difference {(logits[0] - logits[1]).abs().max():.2e}, no error")
print(f"torch alone, ones @ meta: {torch.mm(torch.ones(1, 4), torch.ones(4, 2, device='meta'))}")
sys.exit(not torch.equal(scores[0], scores[1]))
