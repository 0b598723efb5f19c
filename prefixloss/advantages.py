"""Advantages that know where a response goes wrong.

Every function takes a flat batch of B responses in any order; `group_ids` [B] (int64, any labels) says which responses
answer the same prompt. `correct` [B] is bool, `lengths` [B] counts scored tokens, and `first_error` [B] is the 0-based
index, among the scored tokens, of the first token of the first wrong step, -1 where none was found (int64 both). A
response that is wrong without a known first error is penalised from its first token on: never treated as all good.
Means and standard deviations are over the responses of a group; the latter are sample standard deviations (divisor
G - 1, as in TRL and verl) with nothing added, and a group whose standard deviation is 0 gets advantage 0.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.layout import Layout


class TokenAdvantages(NamedTuple):
    """Two advantages a response: A[b, t] = prefix[b] for its first prefix_lengths[b] scored tokens, else suffix[b].

    prefix, suffix: float [B]. prefix_lengths: int64 [B], in scored tokens; 0 for responses that are all of one piece.
    """

    prefix: Tensor
    suffix: Tensor
    prefix_lengths: Tensor

    def per_token(self, like: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The advantage of every token: float, shaped like `like`, 0 where `mask` is False.

        like: any tensor shaped like the tokens, [B, T], or [N] with `cu_seqlens` [B + 1].
        """
        layout = Layout.of(like.shape, like.device, mask, cu_seqlens)
        return self.spread(layout)[0].reshape(like.shape)

    def spread(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """`per_token` over a flat layout, float [N], and which scored tokens take the prefix advantage, bool [N]."""
        check.token_advantages(self, layout)
        response = layout.response_of_token("advantages")
        in_prefix = layout.scored & (layout.rank() < self.prefix_lengths[response])
        values = torch.where(in_prefix, self.prefix[response], self.suffix[response])
        return torch.where(layout.scored, values, torch.zeros_like(values)), in_prefix


class _Groups:
    """Sums over the responses of each group, given back per response."""

    def __init__(self, group_ids: Tensor) -> None:
        labels, self.index = torch.unique(group_ids, return_inverse=True)
        self.order = torch.argsort(self.index, stable=True)
        self.counts = torch.bincount(self.index, minlength=len(labels))
        self.sizes = self.counts[self.index].double()

    def sum(self, values: Tensor) -> Tensor:
        """In a fixed order on every device, in float64."""
        return torch.segment_reduce(values.double()[self.order], "sum", lengths=self.counts, unsafe=True)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes

    def deviations(self, values: Tensor) -> Tensor:
        """values - mean, exactly 0 where a group's values are equal: rounding in the mean is no signal."""
        deviations = values.double() - self.mean(values)
        return torch.where(deviations.abs() <= 1e-12 * values.double().abs(), 0.0, deviations)

    def std(self, values: Tensor) -> Tensor:
        return (self.sum(self.deviations(values) ** 2) / (self.sizes - 1).clamp(min=1)).sqrt()


def _over_std(values: Tensor, std: Tensor) -> Tensor:
    return torch.where(std > 0, values / torch.where(std > 0, std, 1.0), 0.0)


def _token_advantages(prefix: Tensor, suffix: Tensor, prefix_lengths: Tensor) -> TokenAdvantages:
    return TokenAdvantages(prefix.float(), suffix.float(), prefix_lengths.long())


def _cut(shorten: Literal["prompt"] | int | float, lengths: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """c, the tokens trimmed from the end of the good prefix."""
    check.shorten(shorten, lengths, prompt_lengths)
    if shorten == "prompt":
        assert prompt_lengths is not None
        return prompt_lengths.long()
    if isinstance(shorten, Integral):
        return torch.full_like(lengths, int(shorten), dtype=torch.int64)
    # 0.29 of 100 tokens is 29; the binary 0.29 would round down to 28
    share = Fraction(str(shorten)).limit_denominator(10**6)
    return lengths.long() * share.numerator // share.denominator


def vppo(
    correct: Tensor,
    lengths: Tensor,
    first_error: Tensor,
    group_ids: Tensor,
    *,
    prompt_lengths: Tensor | None = None,
    alpha: float = 0.5,
    shorten: Literal["prompt"] | int | float = "prompt",
    relu: bool = False,
    std: bool = False,
) -> TokenAdvantages:
    """Keep the good prefix of a wrong answer, penalise from the first wrong step on (VPPO, arXiv 2601.18984).

    Raw value of a token: 1 in a correct response, `alpha` in the reward prefix of a wrong one, else 0. A_i is its
    average over the response, the baseline the mean of A_i over the group; the advantage is raw - baseline.

    prompt_lengths: int64 [B], needed by shorten="prompt".
    alpha: value of a good-prefix token, constant, in [0, 1].
    shorten: tokens trimmed from the end of the good prefix, so that more steps do not collect more reward: "prompt" (as
        many as the prompt has), an int, or a float share of the response's length, rounded down.
    relu: no good-prefix token of a wrong response below 0 (the paper's choice for instruct models).
    std: divide by the group's standard deviation of A_i.
    """
    check.responses(correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids)
    check.number("alpha", alpha, 0.0, 1.0)
    cut = _cut(shorten, lengths, prompt_lengths)
    groups = _Groups(group_ids)
    erred = ~correct & (first_error >= 0)
    prefix_lengths = torch.where(erred, (first_error - cut).clamp(min=0), 0)
    average = torch.where(correct, 1.0, alpha * prefix_lengths.double() / lengths.clamp(min=1))
    baseline = groups.mean(average)
    prefix = torch.where(correct, 1.0, baseline.new_full((), alpha)) - baseline
    suffix = correct.double() - baseline
    if std:
        spread = groups.std(average)
        prefix, suffix = _over_std(prefix, spread), _over_std(suffix, spread)
    if relu:
        prefix = torch.where(correct, prefix, prefix.clamp(min=0))
    return _token_advantages(prefix, suffix, prefix_lengths)


def cliff(
    correct: Tensor, lengths: Tensor, first_error: Tensor, group_ids: Tensor, *, keep: float = 0.0
) -> TokenAdvantages:
    """The standardised outcome from the first error on, and a share of a correct answer's before it (arXiv 2609.02817).

    With mu the share of correct responses of the group and sigma = sqrt(mu (1 - mu)): (1 - mu) / sigma for tokens of
    correct responses, `keep` times that for good-prefix tokens, -mu / sigma for the rest; less their mean over the
    group's tokens. Groups without variance get 0.
    """
    check.responses(correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids)
    check.number("keep", keep)
    groups = _Groups(group_ids)
    mu = groups.mean(correct)
    sigma = (mu * (1 - mu)).sqrt()
    prefix_lengths = torch.where(correct | (first_error < 0), 0, first_error)
    value = _over_std(1 - mu, sigma)
    suffix = torch.where(correct, value, _over_std(-mu, sigma))
    prefix = torch.where(correct, value, keep * value)
    total = prefix * prefix_lengths + suffix * (lengths - prefix_lengths)
    baseline = groups.sum(total) / groups.sum(lengths).clamp(min=1)
    return _token_advantages(prefix - baseline, suffix - baseline, prefix_lengths)


def grpo(rewards: Tensor, group_ids: Tensor, *, std: bool = True) -> Tensor:
    """(R - mean R) / std R in each group, float32 [B] (arXiv 2402.03300); without `std`, Dr. GRPO (2503.20783)."""
    check.responses(rewards=rewards, group_ids=group_ids)
    groups = _Groups(group_ids)
    advantages = groups.deviations(rewards)
    return (_over_std(advantages, groups.std(rewards)) if std else advantages).float()


def neutral_prefix(response_advantages: Tensor, correct: Tensor, first_error: Tensor) -> TokenAdvantages:
    """Any response-level advantage [B], set to 0 on the good prefix of wrong responses."""
    check.responses(response_advantages=response_advantages, correct=correct, first_error=first_error)
    prefix = torch.where(correct, response_advantages, torch.zeros_like(response_advantages))
    prefix_lengths = torch.where(correct | (first_error < 0), 0, first_error)
    return _token_advantages(prefix, response_advantages, prefix_lengths)


def rts(
    correct: Tensor,
    right_steps: Tensor,
    total_steps: Tensor,
    group_ids: Tensor,
    *,
    beta: float = -10.0,
    gamma: float = 20.0,
    std: bool = True,
) -> Tensor:
    """GRPO on an outcome that credits right steps of wrong responses, float32 [B] (RTS, arXiv 2505.11595).

    Reward: 1 if correct, else 1 / (1 + exp(beta * s + gamma)), s = right_steps / total_steps (int64 [B] both; s is 0
    without a step).
    """
    check.responses(correct=correct, right_steps=right_steps, total_steps=total_steps, group_ids=group_ids)
    check.number("beta", beta)
    check.number("gamma", gamma)
    share = right_steps.double() / total_steps.clamp(min=1)
    return grpo(torch.where(correct, 1.0, torch.sigmoid(-(beta * share + gamma))), group_ids, std=std)


def mixed(
    rewards: Tensor, mean_step_scores: Tensor, group_ids: Tensor, *, weight: float = 0.8, std: bool = True
) -> Tensor:
    """GRPO on weight * mean_step_scores + (1 - weight) * rewards, float32 [B] (arXiv 2506.18896)."""
    check.responses(rewards=rewards, mean_step_scores=mean_step_scores, group_ids=group_ids)
    check.number("weight", weight, 0.0, 1.0)
    return grpo(weight * mean_step_scores.double() + (1 - weight) * rewards.double(), group_ids, std=std)
