"""A plain PyTorch loop with FSDP2: each process has its own responses, and all take the step of one process.

    python examples/fsdp2.py                                  # one process
    torchrun --nproc-per-node 2 examples/fsdp2.py             # two, on the CPU here; NCCL where there are GPUs

It needs the extra "rl". By arithmetic, not measured: Qwen3-8B with AdamW in float32 takes 16 bytes a parameter, 131 GB
in all, 16.4 GB on each of 8 GPUs, and this loss 1 GiB at most on each, whatever the length.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from prefixloss import LossConfig, advantages
from prefixloss.integrations.transformers import PrefixBatch, patch_model
from prefixloss.parallel import global_normalizer

CONFIG = LossConfig(reduction="token-mean")
PROMPT, LENGTH, GROUP = 4, 12, 4


def start() -> torch.device:
    """Joins the processes that torchrun started, or is the only one."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda")


def responses(device: torch.device) -> tuple[torch.Tensor, PrefixBatch]:
    """This process's group of responses; a sampler and a detector would make it."""
    ids = torch.randint(64, (GROUP, PROMPT + LENGTH), device=device)
    mask = (torch.arange(PROMPT + LENGTH, device=device) >= PROMPT).expand_as(ids)
    credit = advantages.vppo(
        correct=torch.tensor([True, False, False, False], device=device),
        lengths=torch.full((GROUP,), LENGTH, device=device),
        first_error=torch.tensor([-1, 8, 3, -1], device=device),
        group_ids=torch.zeros(GROUP, dtype=torch.int64, device=device),
        shorten=0,
    )
    # the denominator of all processes' tokens: FSDP averages gradients, and this accounts for it
    normalizer = global_normalizer(CONFIG, ids, mask=mask)
    return ids, PrefixBatch(mask, credit, normalizer=normalizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    device = start()
    torch.manual_seed(0)  # the same weights everywhere
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device)
    patch_model(model, CONFIG)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(1 + dist.get_rank())
    for step in range(given.steps):
        ids, batch = responses(device)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), prefix_loss=batch)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            print(f"step {step}: this process's loss {out.loss.item():.4f}, gradient norm {norm.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
