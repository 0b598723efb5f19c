"""Advantages of two parts: before the first wrong step of a wrong response, and from it on; and of its steps."""

from __future__ import annotations

from fractions import Fraction
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.advantages.groups import Groups, checked, checked_floor, over_std, rounding_of
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.token_advantages import TokenAdvantages


def _cut(
    shorten: Literal["prompt"] | int | float, lengths: Tensor, prompt_lengths: Tensor | None, judged: Tensor | None
) -> Tensor:
    """c, the tokens trimmed from the end of the good prefix."""
    check.shorten(shorten, lengths, prompt_lengths, judged)
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
    flawed: float | None = None,
    std: bool = False,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> TokenAdvantages:
    """Keep the good prefix of a wrong answer, penalise from the first wrong step on (VPPO, arXiv 2601.18984).

    Raw value of a token: 1 in a correct response, `alpha` in the reward prefix of a wrong one, else 0. A_i is its
    average over the response, the baseline the mean of A_i over the group; the advantage is raw - baseline.

    prompt_lengths: int64 [B], needed by shorten="prompt".
    alpha: value of a good-prefix token, constant, in [0, 1].
    shorten: tokens trimmed from the end of the good prefix, so that more steps do not collect more reward: "prompt" (as
        many as the prompt has), an int, or a float share of the response's length, rounded down.
    relu: no good-prefix token of a wrong response below 0 (the paper's choice for instruct models).
    flawed: what a correct answer is worth from its own first error on, constant, in [0, 1]: the raw value of a token of
        a correct response is 1 before its `first_error` and `flawed` from it on, and A_i = (f + flawed * (L - f)) / L,
        f the error's index and L the length; nothing is trimmed. None: first errors of correct responses are ignored.
    std: divide by the group's standard deviation of A_i. A group of one judged response has none, and gets 0; without
        `std` its good prefix still learns.
    judged: see this package's docstring.
    """
    correct, lengths, first_error, _ = checked(
        judged, correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids
    )
    alpha = check.number("alpha", alpha, 0.0, 1.0)
    check.flag("relu", relu)
    worth = 1.0 if flawed is None else check.number("flawed", flawed, 0.0, 1.0)
    floor = checked_floor(std, std_floor)
    cut = _cut(shorten, lengths, prompt_lengths, judged)
    groups = Groups(group_ids, judged)
    found = first_error >= 0 if flawed is not None else ~correct & (first_error >= 0)
    trimmed = torch.where(correct, first_error, (first_error - cut).clamp(min=0))
    prefix_lengths = torch.where(found, trimmed, 0)
    one = torch.ones_like(lengths, dtype=torch.float64)
    before = torch.where(correct, one, alpha)
    after = torch.where(correct & found, worth, correct.double())
    share = prefix_lengths.double() / lengths.clamp(min=1)
    # 1 exactly where both parts are worth 1
    average = after + (before - after) * share
    baseline = groups.mean(average)
    prefix = groups.less(before, baseline, one)
    suffix = groups.less(after, baseline, one)
    if std:
        spread = groups.spread(groups.deviations(average, rounding_of(average)))
        prefix, suffix = over_std(prefix, spread, floor), over_std(suffix, spread, floor)
    if relu:
        prefix = torch.where(correct, prefix, prefix.clamp(min=0))
    return groups.token_advantages(prefix, suffix, prefix_lengths)


def cliff(
    correct: Tensor,
    lengths: Tensor,
    first_error: Tensor,
    group_ids: Tensor,
    *,
    keep: float = 0.0,
    judged: Tensor | None = None,
) -> TokenAdvantages:
    """The standardised outcome from the first error on, and a share of a correct answer's before it (arXiv 2609.02817).

    With mu the share of correct responses of the group and sigma = sqrt(mu (1 - mu)): (1 - mu) / sigma for tokens of
    correct responses, `keep` times that for good-prefix tokens, -mu / sigma for the rest; less their mean over the
    group's tokens. Groups without variance get 0. judged: see this package's docstring; the mean is over the tokens of
    judged responses.
    """
    correct, lengths, first_error, _ = checked(
        judged, correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids
    )
    keep = check.number("keep", keep)
    groups = Groups(group_ids, judged)
    mu = groups.mean(correct)
    sigma = (mu * (1 - mu)).sqrt()
    prefix_lengths = torch.where(correct | (first_error < 0), 0, first_error)
    value = over_std(1 - mu, sigma)
    suffix = torch.where(correct, value, over_std(-mu, sigma))
    prefix = torch.where(correct, value, keep * value)
    total = prefix * prefix_lengths + suffix * (lengths - prefix_lengths)
    baseline = groups.sum(total) / groups.sum(lengths).clamp(min=1)
    size = torch.maximum(prefix.abs(), suffix.abs())
    prefix, suffix = (groups.less(x, baseline, size) for x in (prefix, suffix))
    return groups.token_advantages(prefix, suffix, prefix_lengths)


def neutral_prefix(
    response_advantages: Tensor, correct: Tensor, first_error: Tensor, *, judged: Tensor | None = None
) -> TokenAdvantages:
    """Any response-level advantage [B], set to 0 on the good prefix of wrong responses, and where nothing is judged."""
    given = {"response_advantages": response_advantages, "correct": correct, "first_error": first_error}
    response_advantages, correct, first_error = checked(judged, **given)
    prefix = torch.where(correct, response_advantages, 0.0)
    prefix_lengths = torch.where(correct | (first_error < 0), 0, first_error)
    return TokenAdvantages(prefix.float(), response_advantages.float(), prefix_lengths.long())


def rts(
    correct: Tensor,
    right_steps: Tensor,
    total_steps: Tensor,
    group_ids: Tensor,
    *,
    beta: float = -10.0,
    gamma: float = 20.0,
    std: bool = True,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> Tensor:
    """GRPO on an outcome that credits right steps of wrong responses, float32 [B] (RTS, arXiv 2505.11595).

    Reward: 1 if correct, else 1 / (1 + exp(beta * s + gamma)), s = right_steps / total_steps (int64 [B] both; s is 0
    without a step). judged: see this package's docstring.

    In a group without a correct response the rewards are tiny (5e-5 at most by default), and `std` makes ordinary
    advantages of them: one right step more may be worth 1.5. That is the method, made for such groups. The rewards are
    exact to float64, so their differences are real however small; equal shares of right steps give exactly 0. Without
    `std` the advantages are as small as the rewards.
    """
    given = {"correct": correct, "right_steps": right_steps, "total_steps": total_steps, "group_ids": group_ids}
    correct, right_steps, total_steps, _ = checked(judged, **given)
    beta = check.number("beta", beta)
    gamma = check.number("gamma", gamma)
    floor = checked_floor(std, std_floor)
    share = right_steps.double() / total_steps.clamp(min=1)
    rewards = torch.where(correct, 1.0, torch.sigmoid(-(beta * share + gamma)))
    return Groups(group_ids, judged).standardised(rewards, rounding_of(rewards), std, floor)


def mixed(
    rewards: Tensor,
    mean_step_scores: Tensor,
    group_ids: Tensor,
    *,
    weight: float = 0.8,
    std: bool = True,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> Tensor:
    """GRPO on weight * mean_step_scores + (1 - weight) * rewards, float32 [B] (arXiv 2506.18896).

    judged: see this package's docstring.
    """
    given = {"rewards": rewards, "mean_step_scores": mean_step_scores, "group_ids": group_ids}
    rewards, mean_step_scores, _ = checked(judged, **given)
    weight = check.number("weight", weight, 0.0, 1.0)
    floor = checked_floor(std, std_floor)
    # a mixture is known as well as its parts are
    rounding = weight * rounding_of(mean_step_scores) + (1 - weight) * rounding_of(rewards)
    values = weight * mean_step_scores.double() + (1 - weight) * rewards.double()
    return Groups(group_ids, judged).standardised(values, rounding, std, floor)


def from_first_error(
    first_error: Tensor, like: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Weights of a distillation that begins where a response goes wrong: float32, shaped like `like`.

    1 from the first token of the first wrong step on, 0 before it, in responses without one, and outside the mask. The
    policy loss keeps or rewards the good prefix and says that what follows is wrong; a teacher says what to do instead:

        adv = advantages.vppo(correct, lengths, first_error, group_ids, shorten=2)
        policy = linear_prefix_loss(hidden, lm_head, tokens, adv, mask=mask)
        weights = advantages.from_first_error(first_error, tokens, mask)
        teacher = linear_distill_loss(
            hidden, lm_head, mask=mask, weights=weights,
            teacher_hidden=teacher_hidden, teacher_lm_head_weight=teacher_lm_head,
        )
        (policy.loss + 0.1 * teacher.loss).backward()

    like: any tensor shaped like the tokens, [B, T], or [N] with `cu_seqlens` [B + 1].
    """
    check.dense("like", like, "a tensor shaped like the tokens")
    check.rows("like", like)
    layout = Layout.of(like.shape, like.device, mask, cu_seqlens)
    check.tensor("first_error", first_error, "integer")
    check.shape("first_error", first_error, (layout.responses("first_error"),), "[B]")
    check.device("first_error", first_error, like.device)
    check.responses(lengths=layout.lengths("first_error"), first_error=first_error.long())
    begins = first_error[layout.response_of_token("first_error")]
    return (layout.scored & (begins >= 0) & (layout.rank() >= begins)).float().reshape(like.shape)
