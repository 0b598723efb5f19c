"""Advantages that know where a response goes wrong.

Every function takes a flat batch of B responses in any order; `group_ids` [B] (int64, any labels) says which responses
answer the same prompt. `correct` [B] is bool, `lengths` [B] counts scored tokens, and `first_error` [B] is the 0-based
index, among the scored tokens, of the first token of the first wrong step, -1 where none was found (int64 both). A
response that is wrong without a known first error is penalised from its first token on: never treated as all good.
Means and standard deviations are over the responses of a group; the latter are sample standard deviations (divisor
G - 1, as in TRL and verl) with nothing added, and a group whose standard deviation is 0 gets advantage 0.

Rewards that differ by their rounding alone are equal: they are taken to be known to one rounding of their own dtype, as
sums of a few such numbers. NaN and infinite ones are refused. Where nobody can say how good a response is (a verifier
timed out), say so: `judged` [B] (bool; None: all) is False there. Such a response is no part of any mean or standard
deviation, G counts the others, and it gets advantage 0 everywhere; its other values are not looked at. A group of which
one response is judged is a group of one, and one without any gets 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.token_advantages import TokenAdvantages

__all__ = ["TokenAdvantages", "cliff", "from_first_error", "grpo", "mixed", "neutral_prefix", "rts", "vppo"]

# of float64, in which means are taken
_EPS = torch.finfo(torch.float64).eps
# roundings by which rewards of equal value may differ: a sum of two products of rounded numbers has about as many
_ROUNDINGS = 4


class _Groups:
    """Sums over the judged responses of each group, given back per response."""

    def __init__(self, group_ids: Tensor, judged: Tensor | None) -> None:
        labels, self.index = torch.unique(group_ids, return_inverse=True)
        self.order = torch.argsort(self.index, stable=True)
        self.counts = torch.bincount(self.index, minlength=len(labels))
        self.judged = torch.ones_like(group_ids, dtype=torch.bool) if judged is None else judged
        self.sizes = self.sum(self.judged).clamp(min=1)

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        """In a fixed order on every device, in float64."""
        values = torch.where(self.judged, values.double(), 0.0)[self.order]
        return torch.segment_reduce(values, how, lengths=self.counts, unsafe=True)[self.index]

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, "sum")

    def largest(self, values: Tensor) -> Tensor:
        """Of |values|."""
        return self._reduced(values.abs(), "max")

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes

    def less(self, values: Tensor, baseline: Tensor, size: Tensor) -> Tensor:
        """values - baseline, exactly 0 where they are equal but for the rounding of a mean of numbers up to `size`."""
        difference = values - baseline
        known = _ROUNDINGS * _EPS * self.sizes * self.largest(size)
        return torch.where(difference.abs() <= known, 0.0, difference)

    def deviations(self, values: Tensor, rounding: Tensor) -> Tensor:
        """values - mean; exactly 0 where they are equal but for rounding, which is no signal.

        rounding: how much one rounding may change each value. A single value may be off by that, and so may their mean,
        to which a float64 sum adds one rounding a response. Where a whole group lies within a few roundings, its values
        are equal numbers that were summed in different orders.
        """
        deviations = values.double() - self.mean(values)
        known = self.largest(rounding + self.sizes * _EPS * values.double().abs())
        equal = (deviations.abs() <= known) | (self.largest(deviations) <= _ROUNDINGS * known)
        # an infinite reward that nobody looked at makes nothing equal
        return torch.where((equal & (known < torch.inf)) | ~self.judged, 0.0, deviations)

    def spread(self, deviations: Tensor) -> Tensor:
        """The standard deviation. In units of the largest deviation: squares of small ones would be 0."""
        unit = self.largest(deviations)
        unit = torch.where(unit == 0, 1.0, unit)
        return unit * (self.sum((deviations / unit) ** 2) / (self.sizes - 1).clamp(min=1)).sqrt()

    def standardised(self, values: Tensor, rounding: Tensor, std: bool) -> Tensor:
        """(values - mean) / std, or without the division, float32 [B]."""
        deviations = self.deviations(values, rounding)
        return (_over_std(deviations, self.spread(deviations)) if std else deviations).float()

    def token_advantages(self, prefix: Tensor, suffix: Tensor, prefix_lengths: Tensor) -> TokenAdvantages:
        prefix, suffix = (torch.where(self.judged, x, 0.0).float() for x in (prefix, suffix))
        return TokenAdvantages(prefix, suffix, prefix_lengths.long())


def _rounding(values: Tensor) -> Tensor:
    """float64 [B]: the distance from each value to the next that its dtype has (float64 for whole numbers)."""
    dtype = torch.finfo(values.dtype if values.is_floating_point() else torch.float64)
    return dtype.eps * values.double().abs().clamp(min=dtype.tiny)


def _over_std(values: Tensor, std: Tensor) -> Tensor:
    """0 for a standard deviation of 0; one that is NaN, of rewards that nobody could look at, stays NaN."""
    return torch.where(std == 0, 0.0, values / torch.where(std == 0, 1.0, std))


def _judged(judged: Tensor | None, **given: Tensor) -> list[Tensor]:
    """The arguments, checked, with "wrong, no error known, of no length and no worth" where nothing is judged."""
    check.responses(judged, **given)
    if judged is None:
        return list(given.values())
    return [
        torch.where(judged, value, -1 if name == "first_error" else 0).to(value.dtype) for name, value in given.items()
    ]


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
    std: bool = False,
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
    std: divide by the group's standard deviation of A_i. A group of one judged response has none, and gets 0; without
        `std` its good prefix still learns.
    judged: see this module's docstring.
    """
    correct, lengths, first_error, _ = _judged(
        judged, correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids
    )
    alpha = check.number("alpha", alpha, 0.0, 1.0)
    check.flag("relu", relu)
    check.flag("std", std)
    cut = _cut(shorten, lengths, prompt_lengths, judged)
    groups = _Groups(group_ids, judged)
    erred = ~correct & (first_error >= 0)
    prefix_lengths = torch.where(erred, (first_error - cut).clamp(min=0), 0)
    average = torch.where(correct, 1.0, alpha * prefix_lengths.double() / lengths.clamp(min=1))
    baseline = groups.mean(average)
    one = torch.ones_like(baseline)
    prefix = groups.less(torch.where(correct, one, alpha), baseline, one)
    suffix = groups.less(correct.double(), baseline, one)
    if std:
        spread = groups.spread(groups.deviations(average, _rounding(average)))
        prefix, suffix = _over_std(prefix, spread), _over_std(suffix, spread)
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
    group's tokens. Groups without variance get 0. judged: see this module's docstring; the mean is over the tokens of
    judged responses.
    """
    correct, lengths, first_error, _ = _judged(
        judged, correct=correct, lengths=lengths, first_error=first_error, group_ids=group_ids
    )
    keep = check.number("keep", keep)
    groups = _Groups(group_ids, judged)
    mu = groups.mean(correct)
    sigma = (mu * (1 - mu)).sqrt()
    prefix_lengths = torch.where(correct | (first_error < 0), 0, first_error)
    value = _over_std(1 - mu, sigma)
    suffix = torch.where(correct, value, _over_std(-mu, sigma))
    prefix = torch.where(correct, value, keep * value)
    total = prefix * prefix_lengths + suffix * (lengths - prefix_lengths)
    baseline = groups.sum(total) / groups.sum(lengths).clamp(min=1)
    size = torch.maximum(prefix.abs(), suffix.abs())
    prefix, suffix = (groups.less(x, baseline, size) for x in (prefix, suffix))
    return groups.token_advantages(prefix, suffix, prefix_lengths)


def grpo(rewards: Tensor, group_ids: Tensor, *, std: bool = True, judged: Tensor | None = None) -> Tensor:
    """(R - mean R) / std R in each group, float32 [B] (arXiv 2402.03300); without `std`, Dr. GRPO (2503.20783).

    judged: see this module's docstring.
    """
    rewards, _ = _judged(judged, rewards=rewards, group_ids=group_ids)
    check.flag("std", std)
    return _Groups(group_ids, judged).standardised(rewards, _rounding(rewards), std)


def neutral_prefix(
    response_advantages: Tensor, correct: Tensor, first_error: Tensor, *, judged: Tensor | None = None
) -> TokenAdvantages:
    """Any response-level advantage [B], set to 0 on the good prefix of wrong responses, and where nothing is judged."""
    given = {"response_advantages": response_advantages, "correct": correct, "first_error": first_error}
    response_advantages, correct, first_error = _judged(judged, **given)
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
    judged: Tensor | None = None,
) -> Tensor:
    """GRPO on an outcome that credits right steps of wrong responses, float32 [B] (RTS, arXiv 2505.11595).

    Reward: 1 if correct, else 1 / (1 + exp(beta * s + gamma)), s = right_steps / total_steps (int64 [B] both; s is 0
    without a step). judged: see this module's docstring.

    In a group without a correct response the rewards are tiny (5e-5 at most by default), and `std` makes ordinary
    advantages of them: one right step more may be worth 1.5. That is the method, made for such groups. The rewards are
    exact to float64, so their differences are real however small; equal shares of right steps give exactly 0. Without
    `std` the advantages are as small as the rewards.
    """
    given = {"correct": correct, "right_steps": right_steps, "total_steps": total_steps, "group_ids": group_ids}
    correct, right_steps, total_steps, _ = _judged(judged, **given)
    beta = check.number("beta", beta)
    gamma = check.number("gamma", gamma)
    check.flag("std", std)
    share = right_steps.double() / total_steps.clamp(min=1)
    rewards = torch.where(correct, 1.0, torch.sigmoid(-(beta * share + gamma)))
    return _Groups(group_ids, judged).standardised(rewards, _rounding(rewards), std)


def mixed(
    rewards: Tensor,
    mean_step_scores: Tensor,
    group_ids: Tensor,
    *,
    weight: float = 0.8,
    std: bool = True,
    judged: Tensor | None = None,
) -> Tensor:
    """GRPO on weight * mean_step_scores + (1 - weight) * rewards, float32 [B] (arXiv 2506.18896).

    judged: see this module's docstring.
    """
    given = {"rewards": rewards, "mean_step_scores": mean_step_scores, "group_ids": group_ids}
    rewards, mean_step_scores, _ = _judged(judged, **given)
    weight = check.number("weight", weight, 0.0, 1.0)
    check.flag("std", std)
    # a mixture is known as well as its parts are
    rounding = weight * _rounding(mean_step_scores) + (1 - weight) * _rounding(rewards)
    values = weight * mean_step_scores.double() + (1 - weight) * rewards.double()
    return _Groups(group_ids, judged).standardised(values, rounding, std)


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


# ---- by name, for command lines, registries and trainers ---------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What is known of a batch of responses: [B] each, as in this module's functions; None where it is not known.

    rewards: None takes `correct` for them. mean_step_scores: None takes the share of right steps.
    """

    correct: Tensor
    lengths: Tensor
    group_ids: Tensor
    first_error: Tensor | None = None
    rewards: Tensor | None = None
    prompt_lengths: Tensor | None = None
    right_steps: Tensor | None = None
    total_steps: Tensor | None = None
    mean_step_scores: Tensor | None = None
    judged: Tensor | None = None


def _neutral_grpo(
    rewards: Tensor,
    group_ids: Tensor,
    correct: Tensor,
    first_error: Tensor,
    *,
    std: bool = True,
    judged: Tensor | None = None,
) -> TokenAdvantages:
    """GRPO, 0 on the good prefix of wrong responses."""
    return neutral_prefix(grpo(rewards, group_ids, std=std, judged=judged), correct, first_error, judged=judged)


BY_NAME: dict[str, Callable[..., Tensor | TokenAdvantages]] = {
    "vppo": vppo,
    "grpo": grpo,
    "dr-grpo": partial(grpo, std=False),
    "cliff": cliff,
    "neutral_prefix": _neutral_grpo,
    "rts": rts,
    "mixed": mixed,
}
# other spellings that are taken
ALIASES = {"neutral": "neutral_prefix"}
# what `assign` makes of the rest where it is not given
_DERIVED = {"rewards": "correct", "mean_step_scores": "right_steps"}


def named(argument: str, name: Any, names: Collection[str] = tuple(BY_NAME)) -> str:
    """The name as the table has it, or the error for the argument: `names` are expected."""
    found = ALIASES.get(name, name) if isinstance(name, str) else name
    if found not in names:
        check.fail(argument, repr(name), " | ".join(map(repr, names)))
    return str(found)


def _arguments(name: str) -> set[str]:
    """The fields of `Outcome` that a function of the table takes."""
    return set(inspect.signature(BY_NAME[name]).parameters) & set(Outcome.__dataclass_fields__)


def needs(name: str) -> set[str]:
    """Beside outcomes, lengths and groups: the fields of `Outcome` without which this one cannot be had."""
    asked = {_DERIVED.get(field, field) for field in _arguments(name)}
    return asked - {"correct", "lengths", "group_ids", "judged", "prompt_lengths"}


def splits(name: str) -> bool:
    """Whether the tokens before a first error get an advantage of their own."""
    return "first_error" in _arguments(name)


def assign(name: str, outcome: Outcome, **options: Any) -> Tensor | TokenAdvantages:
    """Advantages by name: one of `BY_NAME`, given what of the outcome it takes, with its own options."""
    name = named("advantage", name)
    known = {**vars(outcome)}
    if outcome.rewards is None:
        known["rewards"] = outcome.correct.float()
    if outcome.mean_step_scores is None and outcome.right_steps is not None and outcome.total_steps is not None:
        known["mean_step_scores"] = outcome.right_steps / outcome.total_steps.clamp(min=1)
    return BY_NAME[name](**{field: known[field] for field in _arguments(name)}, **options)
