"""pass@1 and pass@k on held-out problems."""

from __future__ import annotations

import math

import torch

from prefixloss.rl import task
from prefixloss.rl.config import Config
from prefixloss.rl.engine import Sampler
from prefixloss.rl.policy import Policy
from prefixloss.rl.team import Team


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    config: Config, policy: Policy, problems: list[task.Problem], team: Team = Team(), sampler: Sampler | None = None
) -> dict[str, float]:
    """pass@1 and pass@k on held-out problems, with random numbers of its own, the same at each evaluation. sampler: as
    in training; None: the policy itself."""
    problems = team.share(problems)
    repeated = [p for p in problems for _ in range(config.eval_samples)]
    size = config.prompts * config.group
    correct: list[bool] = []
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed + team.rank)
        for start in range(0, len(repeated), size):
            chunk = repeated[start : start + size]
            texts = (sampler or policy).sample([p.question for p in chunk], config.max_tokens).texts
            correct += [task.check_answer(p, text) for p, text in zip(chunk, texts, strict=True)]
    counts = torch.tensor(correct).view(len(problems), config.eval_samples).sum(1).tolist()
    ks = list(dict.fromkeys((1, config.k)))
    count, *rates = team.sum([len(counts), *(sum(pass_at_k(config.eval_samples, c, k) for c in counts) for k in ks)])
    return {f"pass@{k}": rate / count for k, rate in zip(ks, rates, strict=True)}
