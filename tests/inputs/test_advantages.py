"""Arithmetic of the advantages that plain formulas would get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixloss import TokenAdvantages, advantages, check

NAN = math.nan
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def one_group(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


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


# Equal but for rounding


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
@pytest.mark.parametrize("parts", [(0.1, 0.6), (0.1, 0.2, 0.4), (0.3, -0.1, 0.5, 0.7), (1 / 3, 1 / 3, 1 / 3)])
def test_rewards_that_are_equal_but_for_their_sums_order_are_no_signal(
    dtype: torch.dtype, offset: float, parts: tuple[float, ...], std: bool
) -> None:
    # one after another in `dtype`, in every order, and the sum as a single number: they differ by a few roundings
    sums = [
        sum(order, torch.zeros((), dtype=dtype)) for order in permutations(torch.tensor((offset, *parts), dtype=dtype))
    ]
    rewards = torch.stack([*sums, torch.tensor(math.fsum((offset, *parts)), dtype=dtype)])
    assert advantages.grpo(rewards, one_group(len(rewards)), std=std).tolist() == [0.0] * len(rewards)
    # the most unlike of them, one against many: the mean does not halve what lies between
    extremes = torch.stack([rewards.max()] * 7 + [rewards.min()])
    assert advantages.grpo(extremes, one_group(8), std=std).tolist() == [0.0] * 8


def test_the_case_that_gave_one_and_a_half_of_nothing() -> None:
    rewards = torch.tensor([[0, 0, 0.7]] * 3 + [[0, 0.1, 0.6]]).sum(1)
    assert rewards.unique().numel() == 2  # in float32 they do differ
    assert advantages.grpo(rewards, one_group(4)).tolist() == [0.0] * 4
    assert advantages.mixed(rewards, rewards, one_group(4)).tolist() == [0.0] * 4
    assert advantages.mixed(rewards.double(), rewards, one_group(4)).tolist() == [0.0] * 4  # as sure as the less sure


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1.0, 100.0, 1e-3])
def test_what_a_dtype_tells_apart_by_more_than_a_few_roundings_is_a_signal(dtype: torch.dtype, size: float) -> None:
    rewards = torch.tensor([size, size * (1 + 32 * torch.finfo(dtype).eps)], dtype=dtype)
    half = math.sqrt(0.5)
    # in float64 the mean may round by one of the 16 steps that the deviations have
    torch.testing.assert_close(advantages.grpo(rewards, one_group(2)), torch.tensor([-half, half]), rtol=0.1, atol=0)


def test_a_small_difference_beside_a_large_number_counts_where_the_dtype_holds_it() -> None:
    near = [1e6, 1e6 + 1e-4]
    assert advantages.grpo(torch.tensor(near), one_group(2)).tolist() == [0.0, 0.0]  # one float32 step there is 0.06
    got = advantages.grpo(torch.tensor(near, dtype=torch.float64), one_group(2), std=False)
    torch.testing.assert_close(got, torch.tensor([-5e-5, 5e-5]))
    whole = torch.tensor([10**6, 10**6 + 1])
    assert advantages.grpo(whole, one_group(2), std=False).tolist() == [-0.5, 0.5]


def test_a_reward_that_is_the_mean_but_for_rounding_gets_nothing() -> None:
    got = advantages.grpo(torch.tensor([0.1, 0.2, 0.3]), one_group(3), std=False)
    assert got[1] == 0  # in float64 the mean of these float32 numbers is 2e-9 from the middle one
    torch.testing.assert_close(got, torch.tensor([-0.1, 0.0, 0.1]))


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e37])
def test_the_size_of_rewards_does_not_count_with_std(scale: float) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64) * scale
    half = math.sqrt(3) / 2
    torch.testing.assert_close(advantages.grpo(rewards, one_group(4)), torch.tensor([half, -half, -half, half]))


def test_vppo_is_exactly_0_where_alpha_is_the_baseline() -> None:
    # A = 1, 0.4 / 4 and 0.4 / 4, whose mean is alpha, in floats 6e-17 beside it
    assert (1 + 0.4 * 1 / 4 + 0.4 * 1 / 4) / 3 != 0.4
    correct, lengths, errors = torch.tensor([True, False, False]), torch.tensor([4, 4, 4]), torch.tensor([-1, 1, 1])
    got = advantages.vppo(correct, lengths, errors, one_group(3), alpha=0.4, shorten=0)
    assert got.prefix[1:].tolist() == [0.0, 0.0]


def test_rts_in_a_group_of_wrong_answers_is_the_formulas() -> None:
    wrong, total = torch.zeros(4, dtype=torch.bool), torch.tensor([4, 4, 4, 8])
    # shares 0, 1/4, 1/4 and 2/8: rewards of 2e-9 and 2.5e-8, and the three equal ones are equal
    got = advantages.rts(wrong, torch.tensor([0, 1, 1, 2]), total, one_group(4))
    torch.testing.assert_close(got, torch.tensor([-1.5, 0.5, 0.5, 0.5]))
    low, high = (1 / (1 + math.exp(20 - 10 * share)) for share in (0, 0.25))
    got = advantages.rts(wrong, torch.tensor([0, 1, 1, 2]), total, one_group(4), std=False)
    torch.testing.assert_close(got, torch.tensor([-0.75, 0.25, 0.25, 0.25]) * (high - low), rtol=1e-6, atol=0)
    # one third and two sixths are the same share
    same = advantages.rts(wrong, torch.tensor([1, 2, 3, 4]), torch.tensor([3, 6, 9, 12]), one_group(4))
    assert same.tolist() == [0.0] * 4


# Rewards that are none


GIVEN: dict[str, Tensor] = {
    "correct": torch.tensor([True, False, False, True, False]),
    "lengths": torch.tensor([4, 6, 5, 3, 8]),
    "first_error": torch.tensor([-1, 3, 0, -1, 5]),
    "group_ids": torch.tensor([0, 0, 0, 1, 1]),
    "prompt_lengths": torch.tensor([1, 1, 1, 2, 2]),
    "right_steps": torch.tensor([2, 1, 0, 2, 1]),
    "total_steps": torch.tensor([2, 3, 2, 2, 3]),
    "rewards": torch.tensor([1.0, 0.25, 0.0, 1.0, 0.5]),
    "mean_step_scores": torch.tensor([0.9, 0.4, 0.1, 0.8, 0.3]),
    "response_advantages": torch.tensor([1.0, -0.5, -0.25, 0.5, -2.0]),
}
GARBAGE: dict[str, Any] = {
    "correct": True, "lengths": 2**62, "first_error": 2**62, "prompt_lengths": -7, "right_steps": 2**62,
    "total_steps": -3, "rewards": NAN, "mean_step_scores": math.inf, "response_advantages": NAN,
}  # fmt: skip
CALLS: list[tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = [
    (advantages.vppo, ("correct", "lengths", "first_error", "group_ids", "prompt_lengths"), {}),
    (advantages.vppo, ("correct", "lengths", "first_error", "group_ids"), {"shorten": 0.1, "std": True}),
    (advantages.vppo, ("correct", "lengths", "first_error", "group_ids"), {"shorten": 1, "relu": True}),
    (advantages.cliff, ("correct", "lengths", "first_error", "group_ids"), {"keep": 0.5}),
    (advantages.grpo, ("rewards", "group_ids"), {}),
    (advantages.grpo, ("rewards", "group_ids"), {"std": False}),
    (advantages.rts, ("correct", "right_steps", "total_steps", "group_ids"), {"beta": -4.0, "gamma": 2.0}),
    (advantages.mixed, ("rewards", "mean_step_scores", "group_ids"), {}),
    (advantages.neutral_prefix, ("response_advantages", "correct", "first_error"), {}),
]
calls = pytest.mark.parametrize(("function", "names", "options"), CALLS)


def columns(result: Tensor | TokenAdvantages) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@calls
@pytest.mark.parametrize("unjudged", [(0,), (1,), (2, 3), (0, 4), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_a_response_without_a_verdict_is_as_if_it_were_not_there(
    function: Callable[..., Any], names: tuple[str, ...], options: dict[str, Any], unjudged: tuple[int, ...]
) -> None:
    judged = torch.tensor([i not in unjudged for i in range(5)])
    given = {name: GIVEN[name].clone() for name in names}
    for name in names:
        if name in GARBAGE:
            given[name][~judged] = GARBAGE[name]
    got = columns(function(**given, **options, judged=judged))
    want = columns(function(**{name: GIVEN[name][judged] for name in names}, **options))
    for all_of_them, those_judged in zip(got, want, strict=True):
        assert torch.equal(all_of_them[judged], those_judged)
        assert not all_of_them[~judged].any()
        assert all_of_them.dtype == those_judged.dtype


@calls
def test_judged_of_all_responses_changes_nothing(
    function: Callable[..., Any], names: tuple[str, ...], options: dict[str, Any]
) -> None:
    given = {name: GIVEN[name] for name in names} | options
    for a, b in zip(columns(function(**given)), columns(function(**given, judged=torch.ones(5) == 1)), strict=True):
        assert torch.equal(a, b)


def test_one_judged_response_is_a_group_of_one() -> None:
    judged = torch.tensor([False, True])
    assert advantages.grpo(torch.tensor([NAN, 0.7]), one_group(2), judged=judged).tolist() == [0.0, 0.0]
    given = torch.tensor([True, False]), torch.tensor([4, 6]), torch.tensor([-1, 3]), one_group(2)
    out = advantages.vppo(*given, shorten=0, judged=judged)
    # A = 0.5 * 3 / 6, its own baseline
    assert (out.prefix.tolist(), out.suffix.tolist(), out.prefix_lengths.tolist()) == ([0, 0.25], [0, -0.25], [0, 3])
    assert not torch.stack(advantages.vppo(*given, shorten=0, std=True, judged=judged)[:2]).any()
    assert not torch.stack(advantages.cliff(*given, judged=judged)[:2]).any()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize(
    ("function", "names", "name"),
    [
        (advantages.grpo, ("rewards", "group_ids"), "rewards"),
        (advantages.mixed, ("rewards", "mean_step_scores", "group_ids"), "rewards"),
        (advantages.mixed, ("rewards", "mean_step_scores", "group_ids"), "mean_step_scores"),
        (advantages.neutral_prefix, ("response_advantages", "correct", "first_error"), "response_advantages"),
    ],
)
def test_rewards_that_are_no_numbers_are_refused_by_response(
    function: Callable[..., Any], names: tuple[str, ...], name: str, bad: float
) -> None:
    given = {n: GIVEN[n].double() if n == name else GIVEN[n] for n in names}
    given[name][3] = bad
    with pytest.raises(
        ValueError, match=rf"{name}: got {bad} for response 3, expected a finite number".replace("+", ".")
    ):
        function(**given)
    function(**given, judged=torch.arange(5) != 3)


@pytest.mark.parametrize("std", [False, True])
def test_rewards_that_nobody_looks_at_are_never_a_silent_0(std: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "readable", lambda _: False)  # as on a GPU without PREFIXLOSS_CHECK
    groups = torch.tensor([0, 0, 1, 1])
    got = advantages.grpo(torch.tensor([NAN, 1.0, 1.0, 0.0]), groups, std=std)
    assert got.isnan().tolist() == [True, True, False, False]
    assert advantages.grpo(torch.tensor([math.inf, 1.0, 1.0, 0.0]), groups, std=std)[:2].isfinite().sum() == 0


@pytest.mark.parametrize("beyond", [2**31, 2**62])
@pytest.mark.parametrize(
    ("function", "names", "name"),
    [
        (advantages.neutral_prefix, ("response_advantages", "correct", "first_error"), "first_error"),
        (advantages.vppo, ("correct", "lengths", "first_error", "group_ids", "prompt_lengths"), "prompt_lengths"),
        (advantages.cliff, ("correct", "lengths", "first_error", "group_ids"), "lengths"),
        (advantages.rts, ("correct", "right_steps", "total_steps", "group_ids"), "total_steps"),
    ],
)
def test_counts_that_no_response_has_are_refused(
    function: Callable[..., Any], names: tuple[str, ...], name: str, beyond: int
) -> None:
    given = {n: GIVEN[n].clone() for n in names}
    given[name][1] = beyond
    with pytest.raises(ValueError, match=rf"{name}: got {beyond} for response 1, expected .* up to 2147483647"):
        function(**given)


# ---- right answers with a first error of their own


FLAWED: dict[str, Any] = {
    "correct": torch.tensor([True, False, True]),
    "lengths": torch.tensor([10, 10, 5]),
    "first_error": torch.tensor([4, 6, -1]),
    "group_ids": torch.tensor([0, 0, 1]),
    "shorten": 2,
}


def test_a_right_answer_is_worth_less_from_its_own_first_error_on() -> None:
    """By hand: A = (4 + 0.25 * 6) / 10 = 0.55 and 0.5 * 4 / 10 = 0.2, so the baseline is 0.375."""
    got = advantages.vppo(**FLAWED, flawed=0.25)
    assert got.prefix_lengths.tolist() == [4, 4, 0]  # only a wrong answer's prefix is trimmed
    assert got.prefix[:2].tolist() == [0.625, 0.125]
    assert got.suffix.tolist() == [-0.125, -0.375, 0.0]


@pytest.mark.parametrize("options", [{}, {"relu": True}, {"std": True}, {"alpha": 0.3}])
def test_first_errors_of_right_answers_are_ignored_by_default(options: dict[str, Any]) -> None:
    blind = {**FLAWED, "first_error": torch.tensor([-1, 6, -1])}
    want = advantages.vppo(**blind, **options)
    for same in (advantages.vppo(**FLAWED, **options), advantages.vppo(**blind, flawed=0.25, **options)):
        assert all(torch.equal(a, b) for a, b in zip(same, want, strict=True))
    # what is worth as much after its error as before it is no different either, token by token
    mask = torch.arange(10) < FLAWED["lengths"][:, None]
    whole = advantages.vppo(**FLAWED, flawed=1.0, **options).per_token(mask, mask)
    assert torch.equal(whole, want.per_token(mask, mask))


@pytest.mark.parametrize("flawed", [-0.1, 1.5, NAN])
def test_a_flawed_answer_s_worth_is_checked(flawed: float) -> None:
    with pytest.raises(ValueError, match="flawed: "):
        advantages.vppo(**FLAWED, flawed=flawed)
