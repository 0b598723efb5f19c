"""VPPO in one plain PyTorch loop: sample, check the answers, find the first wrong step, weigh the tokens, update.

A tiny Llama learns chained arithmetic, first from written solutions, then by RL. It is the algorithm of
`prefixloss train` without its files, processes and options, to be copied: for your own model and task change
`tiny_policy`, `chains`, `check` and `find`. It needs the extra "rl", no GPU, and some minutes on one CPU core:

    python examples/loop.py
    python examples/loop.py --updates 10 --warm-steps 200
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import LossConfig, TokenAdvantages, advantages, linear_logps, linear_prefix_loss
from prefixloss.rl.policy import tiny_policy
from prefixloss.rl.task import Problem, chains, check_answer, check_steps
from prefixloss.steps import decode, token_boundaries

PROMPTS, GROUP, MAX_TOKENS = 16, 8, 64  # prompts an update, responses a prompt, tokens a response
EPOCHS = 2  # optimiser steps on the same responses


class Batch(NamedTuple):
    """B prompts, padded on the left, and their responses, padded on the right to T."""

    ids: Tensor  # int64 [B, P + T]
    attention: Tensor  # int64 [B, P + T]
    mask: Tensor  # bool [B, T]: the response, its end token included


def hidden_of(model: Any, batch: Batch) -> Tensor:
    """[B, T, D]: the state before each response token, from which the head predicts it."""
    positions = (batch.attention.cumsum(1) - 1).clamp(min=0)
    out = model.model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, -batch.mask.shape[1] - 1 : -1]


def tokens_of(batch: Batch) -> Tensor:
    return batch.ids[:, -batch.mask.shape[1] :]


# ---- sample, check, find, weigh, update


@torch.no_grad()
def sample(model: Any, tokenizer: Any, problems: list[Problem]) -> tuple[Batch, list[str]]:
    """A response to each problem, at temperature 1 from the whole distribution, and its text."""
    prompts = tokenizer([f"{p.question}\n" for p in problems], padding=True, return_tensors="pt")
    ids = model.generate(**prompts, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=MAX_TOKENS)
    tokens = ids[:, prompts["input_ids"].shape[1] :]
    ended = tokens == tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.long() == 0  # up to the end token
    batch = Batch(ids, torch.cat([prompts["attention_mask"], mask.long()], 1), mask)
    return batch, [decode(tokenizer, row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


def check(problems: list[Problem], texts: list[str]) -> list[bool]:
    """Whether each answer is right."""
    return [check_answer(problem, text) for problem, text in zip(problems, texts, strict=True)]


def find(tokenizer: Any, problems: list[Problem], batch: Batch, texts: list[str], correct: list[bool]) -> list[int]:
    """The first token of the first wrong step of each wrong answer; -1 where there is none."""
    found = []
    for problem, text, right, row, keep in zip(problems, texts, correct, tokens_of(batch), batch.mask, strict=True):
        steps = check_steps(problem, text)
        if right or steps.wrong < 0:
            found.append(-1)
        else:
            ids = row[keep].tolist()
            found.append(min(token_boundaries(tokenizer, ids, [steps.offset])[0], len(ids) - 1))
    return found


def weigh(batch: Batch, correct: list[bool], first_error: list[int]) -> TokenAdvantages:
    """The good prefix of a wrong answer gets half a right answer's value; all against the mean of the group."""
    group_ids = torch.arange(len(correct)) // GROUP
    lengths, errors = batch.mask.sum(1), torch.tensor(first_error)
    return advantages.vppo(torch.tensor(correct), lengths, errors, group_ids, alpha=0.5, shorten=0)


def update(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, credit: TokenAdvantages) -> float:
    """Steps on the same responses; the clipped ratio holds the later ones near the policy that sampled."""
    head, tokens = model.lm_head.weight, tokens_of(batch)
    with torch.no_grad():
        old_logps = linear_logps(hidden_of(model, batch), head, tokens, mask=batch.mask).logps
    loss = torch.zeros(())
    for _ in range(EPOCHS):
        loss = linear_prefix_loss(
            hidden_of(model, batch), head, tokens, credit, mask=batch.mask, old_logps=old_logps,
            group_ids=torch.arange(len(tokens)) // GROUP, config=LossConfig(reduction="group-token-mean"),
        ).loss  # fmt: skip
        step(model, optimizer, loss)
    return loss.item()


def step(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ---- around it


def warm_start(model: Any, tokenizer: Any, steps: int) -> None:
    """Written solutions first: a model that is never right has nothing to learn from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    tokenizer.padding_side, side = "right", tokenizer.padding_side
    for number in range(steps):
        texts = [f"{p.question}\n{p.solution}{tokenizer.eos_token}" for p in chains(0, 32 * number, 32)]
        ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        mask = ids[:, 1:] != tokenizer.pad_token_id
        solution = mask & ((ids[:, :-1] == tokenizer.convert_tokens_to_ids("\n")).cumsum(1) > 0)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logps = linear_logps(hidden, model.lm_head.weight, ids[:, 1:], mask=solution).logps
        step(model, optimizer, -logps.sum() / solution.sum())
    tokenizer.padding_side = side


def pass_at_1(model: Any, tokenizer: Any, problems: list[Problem]) -> float:
    return sum(check(problems, sample(model, tokenizer, problems)[1])) / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--warm-steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=256, help="problems to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    policy = tiny_policy(hidden_size=64, layers=2)
    model, tokenizer = policy.model, policy.tokenizer
    warm_start(model, tokenizer, options.warm_steps)
    held_out = chains(0, 0, options.held_out, held_out=True)
    print(f"after the warm start: pass@1 {pass_at_1(model, tokenizer, held_out):.1%}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.0)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)  # Adam's first steps are the wildest
    for number in range(options.updates):
        problems = [p for p in chains(1, PROMPTS * number, PROMPTS) for _ in range(GROUP)]
        batch, texts = sample(model, tokenizer, problems)
        correct = check(problems, texts)
        first_error = find(tokenizer, problems, batch, texts, correct)
        loss = update(model, optimizer, batch, weigh(batch, correct, first_error))
        rising.step()
        print(f"update {number + 1}: reward {sum(correct) / len(correct):.1%}, loss {loss:.4f}", flush=True)
    print(f"after {options.updates} updates: pass@1 {pass_at_1(model, tokenizer, held_out):.1%}", flush=True)


if __name__ == "__main__":
    main()
