"""On-policy distillation from the first error on: a teacher of another width shows what should have followed.

    python examples/distill.py             # tiny random models, on the CPU, seconds

It needs the extra "rl". By arithmetic, not measured: beside the policy loss's three products it takes one more with the
teacher's head and three with the student's, for the tokens from the first error on; and the teacher's forward pass.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefixloss import advantages, linear_distill_loss, linear_prefix_loss

VOCABULARY, PROMPT, LENGTH, GROUP = 64, 4, 12, 4


def random_llama(width: int, spread: float) -> LlamaForCausalLM:
    """spread: of the weights; with larger ones the model is surer."""
    shape = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=spread, **shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher's loss beside the policy's")
    given = parser.parse_args()

    torch.manual_seed(0)
    student, teacher = random_llama(32, 0.02), random_llama(48, 0.3).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

    # four responses to one prompt, and where they go wrong; a sampler and a detector would give you these
    ids = torch.randint(VOCABULARY, (GROUP, PROMPT + LENGTH))
    targets = ids[:, 1:]
    mask = (torch.arange(1, PROMPT + LENGTH) >= PROMPT).expand_as(targets)
    correct, first_error = torch.tensor([True, False, False, False]), torch.tensor([-1, 8, 3, -1])
    lengths, group = torch.full((GROUP,), LENGTH), torch.zeros(GROUP, dtype=torch.int64)
    credit = advantages.vppo(correct, lengths, first_error, group, shorten=0)
    weights = advantages.from_first_error(first_error, targets, mask)

    shown = teacher.model(ids).last_hidden_state[:, :-1]
    for step in range(given.steps):
        hidden = student.model(ids).last_hidden_state[:, :-1]
        policy = linear_prefix_loss(hidden, student.lm_head.weight, targets, credit, mask=mask)
        distilled = linear_distill_loss(
            hidden, student.lm_head.weight, mask=mask, weights=weights,
            teacher_hidden=shown, teacher_lm_head_weight=teacher.lm_head.weight,
        )  # fmt: skip
        (policy.loss + given.weight * distilled.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: KL to the teacher from the first error on {distilled.metrics['divergence']:.4f}")


if __name__ == "__main__":
    main()
