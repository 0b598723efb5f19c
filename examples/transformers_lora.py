"""transformers with LoRA on one device: the fused loss inside the model's own forward, two lines around your loop.

    python examples/transformers_lora.py                          # a tiny random Llama, on the CPU, seconds
    python examples/transformers_lora.py --model Qwen/Qwen3-0.6B  # a model of yours; this one is downloaded

It needs the extra "rl" and peft. By arithmetic, not measured: Qwen3-4B in bfloat16 takes 8 GB for its weights, LoRA of
rank 16 another 0.1 GB with AdamW's state, activations with checkpointing a few GB for 8 sequences of 4,096 tokens, and
this loss 1 GiB at most where [8 x 4,096, 151,936] logits in float32 would take 20 GB.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefixloss import LossConfig, advantages
from prefixloss.integrations.transformers import PrefixBatch, patch_model


def load(name: str | None) -> torch.nn.Module:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    torch.manual_seed(0)
    model = get_peft_model(load(given.model), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    patch_model(model, LossConfig(clip_high=0.28))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    # four responses of 12 tokens to one prompt of 4, which a sampler and a detector would give you
    prompt, length = 4, 12
    ids = torch.randint(64, (4, prompt + length))
    mask = (torch.arange(prompt + length) >= prompt).expand_as(ids)
    credit = advantages.vppo(
        correct=torch.tensor([True, False, False, False]),
        lengths=torch.full((4,), length),
        first_error=torch.tensor([-1, 8, 3, -1]),
        group_ids=torch.zeros(4, dtype=torch.int64),
        shorten=0,
    )
    old_logps = None  # the first pass is on policy; its log-probs are those of the sampling policy
    for step in range(given.steps):
        batch = PrefixBatch(mask, credit, old_logps=old_logps)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), prefix_loss=batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        old_logps = out.logps if old_logps is None else old_logps
        print(f"step {step}: loss {out.loss.item():.4f}, ratio at most {out.metrics['ratio_max'].item():.3f}")


if __name__ == "__main__":
    main()
