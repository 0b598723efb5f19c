"""Arithmetic of the advantages that plain formulas would get wrong."""

from __future__ import annotations

import pytest
import torch

from prefixloss import advantages


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("share", "length", "cut"),
    # 0.29 * 100 is 28.999... in binary; a third's digits times the length overflow 64 bits, 0.1234567's 32
    [(0.1, 30, 3), (0.29, 100, 29), (1 / 3, 4000, 1333), (0.1234567, 4000, 493), (1e-20, 4000, 0), (1.0, 40, 40)],
)
def test_share_of_the_length_is_exact_and_rounded_down(dtype: torch.dtype, share: float, length: int, cut: int) -> None:
    error = length - 1
    out = advantages.vppo(
        torch.tensor([False]),
        torch.tensor([length], dtype=dtype),
        torch.tensor([error], dtype=dtype),
        torch.tensor([0]),
        shorten=share,
    )
    assert out.prefix_lengths.tolist() == [max(0, error - cut)]


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("group", [3, 7])
def test_equal_rewards_are_no_signal_to_the_last_bit(std: bool, group: int) -> None:
    # their mean may round, and a token with an advantage of 1e-17 would still be paid for
    ids = torch.zeros(group, dtype=torch.int64)
    rewards = torch.full((group,), 0.1, dtype=torch.float64)
    assert advantages.grpo(rewards, ids, std=std).tolist() == [0.0] * group
    assert advantages.mixed(rewards, rewards, ids, std=std).tolist() == [0.0] * group


def test_large_integers_as_group_labels_and_no_response_at_all() -> None:
    ids = torch.tensor([2**62, -(2**62), 2**62])
    assert advantages.grpo(torch.tensor([1.0, 5.0, 0.0]), ids, std=False).tolist() == [0.5, 0.0, -0.5]
    empty = torch.zeros(0)
    assert advantages.grpo(empty, empty.long()).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_outcomes_may_be_given_as_bool_or_integers(dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0, 0]).to(dtype)
    assert advantages.grpo(rewards, torch.zeros(4).long(), std=False).tolist() == [0.75, -0.25, -0.25, -0.25]
