"""Baselines of responses, a value head's advantages and loss: numbers by hand, and who has no signal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixloss import TokenAdvantages, advantages

NEAR = {"rtol": 1e-5, "atol": 1e-6}
REWARDS, LENGTHS = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([2, 4, 4, 10])
GROUPS = torch.tensor([0, 0, 1, 1])


def assert_near(got: Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want), **NEAR)


def test_rloo_is_less_the_mean_of_the_others() -> None:
    assert_near(advantages.rloo(REWARDS, GROUPS), [1.0, -1.0, -2.0, 2.0])
    assert_near(advantages.rloo(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3).long()), [1.0, -0.5, -0.5])
    assert_near(advantages.rloo(torch.tensor([3.0]), torch.zeros(1).long()), [0.0])


def test_opo_weighs_the_baseline_by_length() -> None:
    # 2 / 6 and 20 / 14
    assert_near(advantages.opo(REWARDS, LENGTHS, GROUPS), [2 / 3, -1 / 3, -10 / 7, 4 / 7])


def test_reinforce_pp_is_standardised_over_the_batch_s_tokens() -> None:
    # 8 tokens, mean 1 / 4, variance (2 * 9 / 16 + 6 / 16) / 7 = 1.5 / 7
    got = advantages.reinforce_pp(torch.tensor([1.0, 0.0]), torch.tensor([2, 6]))
    std = math.sqrt(1.5 / 7)
    assert_near(got, [0.75 / std, -0.25 / std])


def test_its_baseline_form_takes_the_group_s_mean_first() -> None:
    # deviations 1/2, -1/2, 0, 0, of mean 0 over the tokens, variance (1 / 4 + 1 / 4) / 7
    got = advantages.reinforce_pp_baseline(torch.tensor([1.0, 0, 3, 3]), torch.tensor([1, 1, 2, 4]), GROUPS)
    assert_near(got, [0.5 * math.sqrt(14), -0.5 * math.sqrt(14), 0.0, 0.0])
    # of other lengths the mean is not 0: (3 / 2 - 1 / 2) / 4 = 1 / 4, variance (3 / 16 + 9 / 16) / 3
    got = advantages.reinforce_pp_baseline(torch.tensor([1.0, 0]), torch.tensor([3, 1]), torch.zeros(2).long())
    assert_near(got, [0.5, -1.5])


NAMES = list(advantages.OF_RESPONSES)


def outcome(**more: Any) -> advantages.Outcome:
    known = {"correct": torch.tensor([True, False, False, True]), "lengths": LENGTHS, "group_ids": GROUPS}
    return advantages.Outcome(**{**known, "first_error": torch.tensor([-1, 3, -1, -1]), **more})


@pytest.mark.parametrize("name", NAMES)
def test_each_gives_a_good_prefix_0_where_an_error_is_known(name: str) -> None:
    plain = advantages.assign(name, outcome())
    got = advantages.assign("neutral_prefix", outcome(), of=name)
    assert isinstance(plain, Tensor)
    assert isinstance(got, TokenAdvantages)
    assert torch.equal(got.suffix, plain)
    assert got.prefix.tolist() == [plain[0], 0, 0, plain[3]]
    assert got.prefix_lengths.tolist() == [0, 3, 0, 0]


def test_the_one_that_is_neutral_on_prefixes_is_named_or_refused() -> None:
    with pytest.raises(ValueError, match=r"^of: got 'vppo', expected 'grpo' \| 'dr-grpo'"):
        advantages.assign("neutral_prefix", outcome(), of="vppo")
    scaled = advantages.assign("neutral_prefix", outcome(), std=False)
    assert torch.equal(scaled[1], advantages.grpo(outcome().correct.float(), GROUPS, std=False))


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_and_unjudged_ones_have_exactly_no_advantage(name: str) -> None:
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
    same = advantages.assign(name, outcome(rewards=rewards))
    assert same.tolist() == [0.0] * 4
    judged = torch.tensor([True, True, False, True])
    rewards = torch.tensor([1.0, 0.0, math.nan, 5.0])
    got = advantages.assign(name, outcome(rewards=rewards, judged=judged))
    assert got[2] == 0
    assert got.isfinite().all()
    without = advantages.Outcome(
        torch.tensor([True, False, True]), LENGTHS[judged], GROUPS[judged], rewards=rewards[judged]
    )
    torch.testing.assert_close(got[judged], advantages.assign(name, without), **NEAR)


@pytest.mark.parametrize("name", ["grpo", "vppo", "rts", "mixed", "reinforce++", "reinforce++-baseline"])
def test_no_less_than_the_floor_is_divided_by(name: str) -> None:
    given = outcome(
        rewards=torch.tensor([0.50, 0.51, 0.52, 0.53]), right_steps=torch.tensor([3, 2, 1, 0]),
        total_steps=torch.tensor([4] * 4),
    )  # fmt: skip
    options: dict[str, Any] = {"vppo": {"shorten": 0, "std": True}}.get(name, {})
    first, other = (advantages.assign(name, given, std_floor=floor, **options) for floor in (100.0, 200.0))
    free = advantages.assign(name, given, **options)
    pairs = zip(*([x] if isinstance(x, Tensor) else list(x[:2]) for x in (first, other, free)), strict=True)
    for a, b, c in pairs:
        torch.testing.assert_close(a, 2 * b)
        assert (c.abs() > 10 * a.abs())[a != 0].all()
        assert torch.equal(a == 0, c == 0)
    tiny = advantages.assign(name, given, std_floor=1e-9, **options)
    torch.testing.assert_close(tiny[1], free[1])
    with pytest.raises(ValueError, match=r"^std_floor: got -1"):
        advantages.assign(name, given, std_floor=-1, **options)


def test_a_floor_of_what_is_not_divided_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^std_floor: got 0\.1 with std=False"):
        advantages.grpo(REWARDS, GROUPS, std=False, std_floor=0.1)


def test_groups_without_variance_are_known() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 7.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert advantages.varied(rewards, groups).tolist() == [False, False, True, True, True, True]
    judged = torch.tensor([True] * 5 + [False])
    assert advantages.varied(rewards, groups, judged=judged).tolist() == [False, False, True, True, False, False]


# ---- a value head ------------------------------------------------------------------------------------------

VALUES = torch.tensor([[0.5, 0.25, 0.5]])
HALF = {"gamma": 0.5, "lam": 0.5}


def test_gae_by_hand() -> None:
    # deltas -0.375, 0, 0.5
    made, returns = advantages.gae(torch.tensor([1.0]), VALUES, **HALF)
    assert_near(made[0], [-0.34375, 0.125, 0.5])
    assert_near(returns[0], [0.15625, 0.375, 1.0])
    by_token, _ = advantages.gae(torch.tensor([[0.0, 2.0, 1.0]]), VALUES, **HALF)
    assert_near(by_token[0], [-0.34375 + 0.5, 2.125, 0.5])


def test_gae_skips_what_is_not_scored_and_is_the_same_packed() -> None:
    # deltas 0.5 * 0.5 - 0.5 and 0.5
    mask = torch.tensor([[True, False, True]])
    values = VALUES.where(mask, math.nan)
    made, returns = advantages.gae(torch.tensor([1.0]), values, mask=mask, **HALF)
    assert_near(made[0], [-0.125, 0.0, 0.5])
    assert_near(returns[0], [0.375, 0.0, 1.0])
    flat = torch.cat([values[0], torch.tensor([0.25, 0.5])])
    scored = torch.tensor([True, False, True, True, True])
    packed, _ = advantages.gae(
        torch.tensor([1.0, 0.0]), flat, mask=scored, cu_seqlens=torch.tensor([0, 3, 3 + 2]), **HALF
    )
    assert_near(packed, [-0.125, 0.0, 0.5, 0.0 + 0.25 * -0.5, -0.5])


def test_a_first_error_is_where_the_reward_is_earned() -> None:
    # gamma = lam = 1: the rest of the rewards less the value
    rewards, first = torch.tensor([-1.0, -1.0]), torch.tensor([1, -1])
    made, _ = advantages.gae(rewards, VALUES.expand(2, 3), lam=1.0, first_error=first)
    assert_near(made[0], [-1.5, -1.25, -0.5])
    assert_near(made[1], [-1.5, -1.25, -1.5])


def test_the_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 3.0, 9.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 3.1, math.nan]), torch.tensor([1.0, 1.0, math.nan])
    mask = torch.tensor([1, 1, 0])
    # held at 0.2, its error is 0.64; the other is within its bounds: 4
    loss = advantages.value_loss(values, old, returns, mask=mask)
    assert_near(loss, 4.64 / 4)
    loss.backward()
    assert values.grad is not None
    assert_near(values.grad, [0.0, 1.0, 0.0])
    assert_near(advantages.value_loss(values, old, returns, mask=mask, clip=None), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma: got 1.5"),
        ({"rewards": torch.ones(2)}, "rewards: got shape"),
        ({"rewards": torch.tensor([math.nan])}, "rewards: got nan"),
        ({"values": VALUES.where(VALUES > 0.3, math.inf)}, "values: got inf"),
        ({"rewards": VALUES, "first_error": torch.tensor([1])}, "first_error: got a value with a reward a token"),
        ({"first_error": torch.tensor([3])}, "first_error: got 3 for response 0"),
    ],
)
def test_what_a_value_head_is_given_is_checked(change: dict[str, Any], message: str) -> None:
    given = {"rewards": torch.tensor([1.0]), "values": VALUES, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        advantages.gae(**given)
    with pytest.raises(ValueError, match=r"^returns: got shape \[1\]"):
        advantages.value_loss(VALUES, VALUES, torch.ones(1))
