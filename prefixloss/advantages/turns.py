"""Advantages of an agent's turns: what each earned, beside what came of them all."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.advantages.groups import Groups, checked, checked_floor, rounding_of
from prefixloss.inputs.turns import Numbered


def turn_level(
    rewards: Tensor,
    turn_rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    weight: float = 1.0,
    std: bool = True,
    std_floor: float = 0.0,
    judged: Tensor | None = None,
) -> Tensor:
    """The advantage of every token by its turn, float32 shaped like `mask`: MT-GRPO (arXiv 2505.11821).

    A_{i,k} = A^O_i + weight A^T_{i,k} in each turn k before a response's last, A^O_i in the last, whose reward is the
    outcome. A^O is (R - mean R) / std R over the group, and A^T the same of the k-th turns' rewards, over those
    responses of the group that have a k-th turn which is not their last. 0 outside the mask.

    rewards: [B], of the outcome. turn_rewards: [B, K], of the turns in order, K at least the most that a response has
        before its last one; what stands there for the last or for no turn is not looked at.
    mask: bool or 0/1, [B, T], or [N] with `cu_seqlens` [B + 1]; what is scored without a gap is one turn.
    std: divide by the standard deviations, which are at least `std_floor`. judged: see this package's docstring.
    """
    rewards, _ = checked(judged, rewards=rewards, group_ids=group_ids)
    weight, floor = check.number("weight", weight), checked_floor(std, std_floor)
    _, response, number, counts = Numbered.of(mask, cu_seqlens)
    before_last = counts - 1
    check.shape("rewards", rewards, before_last.shape, "[B], the responses of the mask")
    check.device("rewards", rewards, mask.device)
    earned = _earned(turn_rewards, before_last, judged)
    by_turn = (
        Groups(group_ids, judged)
        .standardised(rewards, rounding_of(rewards), std, floor)[:, None]
        .repeat(1, earned.shape[1] + 1)
    )
    for k in range(earned.shape[1]):
        there = (k < before_last) if judged is None else (k < before_last) & judged
        values = torch.where(there, earned[:, k], 0)
        of_turn = Groups(group_ids, there).standardised(values, rounding_of(values), std, floor)
        by_turn[:, k] += torch.where(there, weight * of_turn, 0.0)
    return torch.where(number >= 0, by_turn[response, number.clamp(min=0)], 0.0).reshape(mask.shape)


def _earned(turn_rewards: Tensor, before_last: Tensor, judged: Tensor | None) -> Tensor:
    """[B, K'], those before a response's last turn, K' the most of them."""
    check.tensor("turn_rewards", turn_rewards, "number")
    if turn_rewards.dim() != 2:
        check.fail("turn_rewards", f"shape {list(turn_rewards.shape)}", "[B, K]")
    most = max(int(before_last.max()), 0) if len(before_last) else 0
    if len(turn_rewards) != len(before_last) or turn_rewards.shape[1] < most:
        check.fail("turn_rewards", f"shape {list(turn_rewards.shape)}", f"[{len(before_last)}, {most}] or more turns")
    check.device("turn_rewards", turn_rewards, before_last.device)
    earned = turn_rewards[:, :most]
    asked = torch.arange(most, device=earned.device) < before_last[:, None]
    if earned.is_floating_point():
        wrong = (asked & ~earned.isfinite()).any(1)
        check.none("turn_rewards", earned.double().sum(1), wrong, "finite numbers", judged=judged)
    return earned
