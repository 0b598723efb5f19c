"""Which tokens learn: generated batches of responses, put through the package's own advantages.

A batch has groups of 8 responses. Lengths are uniform between half and one and a half of the mean; 12 % of the wrong
responses err in their first step and the others anywhere in their first 77 %, so that the mean good prefix is the 34 %
that "Save the Good Prefix" (arXiv 2601.18984) found. A response is right with probability 0.37, what the paper's best
8B model reaches; groups without both outcomes are drawn again, except the solved ones, in which all are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss import TokenAdvantages, advantages

GROUP = 8
FEWEST_GROUPS, LONGEST_MEAN = 4, 4096
PASS_RATE, FIRST_STEP_WRONG, MEAN_PREFIX = 0.37, 0.12, 0.34


class Batch(NamedTuple):
    """B responses: outcomes, bool [B]; lengths and first errors in tokens (-1 for a right one), int64 [B]."""

    correct: Tensor
    lengths: Tensor
    first_error: Tensor
    group_ids: Tensor


class Setting(NamedTuple):
    """What an advantage function and a loss make of a batch. solved: share of groups in which all are right."""

    text: str
    advantages: Callable[[Batch], Tensor | TokenAdvantages]
    solved: float = 0.0
    equal: bool = False  # lengths
    kl_coef: float = 0.0


def _grpo(batch: Batch) -> Tensor:
    return advantages.grpo(batch.correct.double(), batch.group_ids)


def _neutral(batch: Batch) -> TokenAdvantages:
    return advantages.neutral_prefix(_grpo(batch), batch.correct, batch.first_error)


def _vppo_relu(batch: Batch) -> TokenAdvantages:
    return advantages.vppo(*batch, shorten=0.1, relu=True)


SETTINGS = {
    "dense": Setting("GRPO with a k3 KL penalty, equal lengths: every token learns", _grpo, equal=True, kl_coef=0.05),
    "grpo": Setting("GRPO, both outcomes in every group", _grpo),
    "vppo-relu": Setting("VPPO with ReLU: prefixes below the group's mean are 0", _vppo_relu),
    "neutral-prefix": Setting("GRPO with neutral good prefixes, 34 % of a wrong response on average", _neutral),
    "half-solved": Setting("GRPO, half of the groups solved: their advantages are 0", _grpo, solved=0.5),
}


def setting_of(name: str) -> Setting:
    """One of `SETTINGS`, or "solved-PERCENT"."""
    if name in SETTINGS:
        return SETTINGS[name]
    solved = int(name.removeprefix("solved-")) / 100
    return Setting(f"GRPO, {solved:.0%} of the groups solved", _grpo, solved=solved)


def is_setting(name: str) -> bool:
    return name in SETTINGS or re.fullmatch(r"solved-(\d|[1-9]\d)", name) is not None


def generate(tokens: int, setting: Setting, seed: int = 0) -> Batch:
    """Responses of `tokens` tokens in all, each at least one of the 8 that there must be; `dense` is a single group."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if setting.equal else max(min(FEWEST_GROUPS, tokens // GROUP), tokens // (GROUP * LONGEST_MEAN))
    lengths = _lengths(tokens, groups * GROUP, setting.equal, generator)
    correct = torch.stack([_outcomes(g < round(setting.solved * groups), generator) for g in range(groups)]).flatten()
    share = torch.rand(len(lengths), generator=generator) * 2 * MEAN_PREFIX / (1 - FIRST_STEP_WRONG)
    share[torch.rand(len(lengths), generator=generator) < FIRST_STEP_WRONG] = 0
    first_error = torch.where(correct, -1, (share * lengths).long())
    return Batch(correct, lengths, first_error, torch.arange(groups).repeat_interleave(GROUP))


def _lengths(total: int, responses: int, equal: bool, generator: torch.Generator) -> Tensor:
    """Whole numbers >= 1 that add up to `total`."""
    weights = torch.ones(responses) if equal else 0.5 + torch.rand(responses, generator=generator)
    ends = (weights.double().cumsum(0) / weights.double().sum() * (total - responses)).round().long()
    return ends.diff(prepend=ends.new_zeros(1)) + 1


def _outcomes(solved: bool, generator: torch.Generator) -> Tensor:
    if solved:
        return torch.ones(GROUP, dtype=torch.bool)
    while True:
        outcomes = torch.rand(GROUP, generator=generator) < PASS_RATE
        if outcomes.any() and not outcomes.all():
            return outcomes


class Credit(NamedTuple):
    """Per token, float32 [N]: advantages; and per response [B] where one number says all, else None."""

    lengths: Tensor
    by_token: Tensor
    by_response: Tensor | None

    def learning(self, setting: Setting) -> Tensor:
        """bool [N]: tokens whose gradient can be other than 0."""
        return torch.ones_like(self.by_token, dtype=torch.bool) if setting.kl_coef else self.by_token != 0


def credit_of(tokens: int, setting: Setting, seed: int = 0) -> Credit:
    """A batch of `tokens` tokens and what each of them is credited with."""
    batch = generate(tokens, setting, seed)
    given = setting.advantages(batch)
    if isinstance(given, Tensor):
        return Credit(batch.lengths, given.repeat_interleave(batch.lengths), given)
    offsets = torch.cat([batch.lengths.new_zeros(1), batch.lengths.cumsum(0)])
    return Credit(batch.lengths, given.per_token(torch.empty(tokens), cu_seqlens=offsets), None)
