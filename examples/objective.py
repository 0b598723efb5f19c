"""An objective of your own, in ten lines, with the fused head: a tiny policy learns to write ids from the lower half.

    python examples/objective.py             # a tiny random model, on the CPU, seconds

It needs the extra "rl". The function sees log-probs and what is known of the tokens, and gives each token's loss;
coefficients, chunks and kernels are the package's. `docs/objectives.md` says what it may use.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prefixloss import LossConfig, advantages, linear_logps, linear_prefix_loss
from prefixloss.maths.objectives import View

VOCABULARY, LENGTH, GROUP = 64, 12, 16


def mine(logp: Tensor, given: View) -> Tensor:
    """The geometric mean of a response's ratios, each held near 1 (as in GMPO), where the batch is not sure by far."""
    log_ratio, a = given.ratio.log(), given.advantages
    held = torch.where(a >= 0, log_ratio.clamp(max=0.4), log_ratio.clamp(min=-0.4))
    loss = -torch.exp(given.response.mean(held)) * a
    sure = logp.detach() > 0.5 * given.batch.mean(logp)
    return torch.where(sure & (a > 0), 0.5 * loss, loss)


@torch.no_grad()
def sampled(model: LlamaForCausalLM) -> Tensor:
    """int64 [GROUP, 1 + LENGTH]: responses to the prompt 0."""
    ids = torch.zeros(GROUP, 1, dtype=torch.int64)
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], 1)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = LossConfig(objective=mine, reduction="seq-mean-token-mean")
    for step in range(given.steps):
        ids = sampled(model)
        tokens = ids[:, 1:]
        rewards = (tokens < VOCABULARY // 2).float().mean(1)
        credit = advantages.rloo(rewards, torch.zeros(GROUP, dtype=torch.int64))
        old = None
        for _ in range(2):  # the second pass is off policy
            hidden = model.model(ids).last_hidden_state[:, :-1]
            if old is None:
                old = linear_logps(hidden.detach(), model.lm_head.weight.detach(), tokens).logps
            out = linear_prefix_loss(hidden, model.lm_head.weight, tokens, credit, old_logps=old, config=config)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: ratio at most {out.metrics['ratio_max']:.3f}, reward {rewards.mean():.3f}")


if __name__ == "__main__":
    main()
