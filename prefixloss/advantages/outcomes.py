"""Advantages of a response from its reward alone: one number each, less a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss.advantages.groups import Groups, checked, checked_floor, over_std, rounding_of


def grpo(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    std: bool = True,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> Tensor:
    """(R - mean R) / std R in each group, float32 [B] (arXiv 2402.03300); without `std`, Dr. GRPO (2503.20783).

    judged: see this package's docstring.
    """
    rewards, _ = checked(judged, rewards=rewards, group_ids=group_ids)
    floor = checked_floor(std, std_floor)
    return Groups(group_ids, judged).standardised(rewards, rounding_of(rewards), std, floor)


def rloo(rewards: Tensor, group_ids: Tensor, *, judged: Tensor | None = None) -> Tensor:
    """R_i - mean of the other responses' R = G / (G - 1) (R_i - mean R), float32 [B]: RLOO (arXiv 2402.14740).

    A group of one has no others, and gets 0. judged: see this package's docstring.
    """
    rewards, _ = checked(judged, rewards=rewards, group_ids=group_ids)
    groups = Groups(group_ids, judged)
    deviations = groups.deviations(rewards, rounding_of(rewards))
    return (deviations * groups.sizes / (groups.sizes - 1).clamp(min=1)).float()


def opo(rewards: Tensor, lengths: Tensor, group_ids: Tensor, *, judged: Tensor | None = None) -> Tensor:
    """R_i - sum_j l_j R_j / sum_j l_j over the group, l the lengths in tokens, float32 [B]: OPO (arXiv 2505.23585).

    The baseline of least variance, where a response's squared gradient grows like its length. judged: see this
    package's docstring.
    """
    rewards, lengths, _ = checked(judged, rewards=rewards, lengths=lengths, group_ids=group_ids)
    groups = Groups(group_ids, judged)
    tokens = groups.sum(lengths)
    # of the deviations, so that equal rewards give exactly 0
    deviations = groups.deviations(rewards, rounding_of(rewards))
    return (deviations - groups.sum(lengths * deviations) / tokens.clamp(min=1)).where(groups.judged, 0.0).float()


def reinforce_pp(rewards: Tensor, lengths: Tensor, *, std_floor: float = 0.0, judged: Tensor | None = None) -> Tensor:
    """(R - mean R) / std R over all tokens of the batch, float32 [B]: REINFORCE++ (arXiv 2501.03262).

    Each response counts with its length, as in OpenRLHF and verl; the standard deviation has the divisor N - 1, N
    tokens. On several processes these are of the local batch. judged: see this package's docstring.
    """
    rewards, lengths = checked(judged, rewards=rewards, lengths=lengths)
    everyone = Groups(torch.zeros_like(lengths), judged)
    return _over_tokens(everyone, everyone.deviations(rewards, rounding_of(rewards)), lengths, std_floor)


def reinforce_pp_baseline(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    *,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> Tensor:
    """The same of R - mean R over the group: REINFORCE++-baseline (arXiv 2501.03262)."""
    rewards, lengths, _ = checked(judged, rewards=rewards, lengths=lengths, group_ids=group_ids)
    deviations = Groups(group_ids, judged).deviations(rewards, rounding_of(rewards))
    return _over_tokens(Groups(torch.zeros_like(lengths), judged), deviations, lengths, std_floor)


def _over_tokens(everyone: Groups, values: Tensor, lengths: Tensor, std_floor: float) -> Tensor:
    """Values [B], each of all its response's tokens, less their mean over tokens, over their standard deviation."""
    floor = checked_floor(True, std_floor)
    tokens = everyone.sum(lengths)
    centred = (values - everyone.sum(lengths * values) / tokens.clamp(min=1)).where(everyone.judged, 0.0)
    unit = everyone.largest(centred)
    unit = torch.where(unit == 0, 1.0, unit)
    std = unit * (everyone.sum(lengths * (centred / unit) ** 2) / (tokens - 1).clamp(min=1)).sqrt()
    return over_std(centred, std, floor).float()


def varied(rewards: Tensor, group_ids: Tensor, *, judged: Tensor | None = None) -> Tensor:
    """bool [B]: responses of groups whose rewards differ; the others teach nothing (DAPO, arXiv 2503.14476).

    Their advantage is 0, but a KL penalty or an entropy bonus still acts on them. To leave them out of the loss
    altogether, take their tokens out of its mask: `mask & varied(rewards, group_ids)[:, None]`.
    """
    rewards, _ = checked(judged, rewards=rewards, group_ids=group_ids)
    groups = Groups(group_ids, judged)
    return groups.largest(groups.deviations(rewards, rounding_of(rewards))) > 0
