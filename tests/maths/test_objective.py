"""The coefficients of a token's loss, value by value, against autograd through the oracle's formulas."""

from __future__ import annotations

import math
from itertools import product

import oracle
import pytest
import torch

from prefixloss import LossConfig
from prefixloss.inputs.batch import Given
from prefixloss.maths.objective import Terms, clipped, token_terms

# ratios on both sides of every bound used below (0.8, 1.2, 1, caps 1.1 and 3, 5) and far outside them
RATIOS = [0.0625, 0.5, 0.79, 0.81, 1.0, 1.05, 1.15, 1.19, 1.21, 2.9, 3.1, 4.9, 5.1, 100.0]
ADVANTAGES = [-2.0, -0.5, 0.0, 0.5, 2.0]
CONFIGS = [
    LossConfig(),
    LossConfig(clip_low=0.0, clip_high=0.0),
    LossConfig(clip_low=1.5, clip_high=0.28),
    LossConfig(ratio_cap=1.1),
    LossConfig(ratio_cap=3.0),
    LossConfig(dual_clip=3.0),
    LossConfig(dual_clip=3.0, ratio_cap=5.0),
    LossConfig(objective="cispo", clip_high=5.0),
    LossConfig(objective="sapo"),
    LossConfig(objective="sapo", sapo_tau=(0.5, 3.0)),
    LossConfig(objective="reinforce"),
    LossConfig(objective="topr"),
]


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ratio, advantage = torch.tensor(list(product(RATIOS, ADVANTAGES)), dtype=torch.float64).T
    old = torch.full_like(ratio, -6.0)
    return old + ratio.log(), old, advantage


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_policy_term_equals_autograd_of_the_plain_formula(config: LossConfig) -> None:
    logp, old, advantage = grid()
    leaf = logp.clone().requires_grad_()
    options, ratio = vars(config), (leaf - old).exp()
    plain = torch.stack(
        [oracle.objective_term(options, float(a), r, x) for a, r, x in zip(advantage, ratio, leaf, strict=True)]
    )
    (slope,) = torch.autograd.grad(plain.sum(), leaf)
    terms = token_terms(config, Given(advantage, old, None, None), logp, torch.zeros_like(logp), None)
    torch.testing.assert_close(terms.loss, plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.d_logp, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", [False, True])
def test_kl_term_has_the_derivative_of_its_value(kl: str, importance: bool) -> None:
    config = LossConfig(objective="reinforce", kl=kl, kl_coef=0.7, kl_importance=importance)
    logp, old, advantage = grid()
    given = Given(torch.zeros_like(advantage), old, None, old.roll(1) + 0.3)
    leaf = logp.clone().requires_grad_()
    d = given.ref_logps - leaf
    value = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kl]
    loss = 0.7 * value * ((leaf - old).exp() if importance else 1)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    terms = token_terms(config, given, logp, torch.zeros_like(logp), None)
    torch.testing.assert_close(terms.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.d_logp, slope, rtol=1e-12, atol=1e-12)


def terms_at(config: LossConfig, log_ratio: float, advantage: float, **given: torch.Tensor) -> Terms:
    logp = torch.tensor([-1.0])
    known = {"sampler_logps": None, "ref_logps": None, **given}
    return token_terms(config, Given(torch.tensor([advantage]), logp - log_ratio, **known), logp, torch.zeros(1), None)


# exp(200) overflows float32
@pytest.mark.parametrize(
    ("config", "advantage", "loss", "slope"),
    [
        (LossConfig(), 1.0, -1.2, 0.0),
        (LossConfig(), -1.0, math.inf, math.inf),
        (LossConfig(dual_clip=3.0), -1.0, 3.0, 0.0),
        (LossConfig(ratio_cap=4.0), -1.0, 4.0, 0.0),
        (LossConfig(), 0.0, 0.0, 0.0),
        (LossConfig(objective="cispo", clip_high=5.0), 1.0, 5.0, -5.0),  # -5 * 1 * logp, logp = -1
        (LossConfig(objective="topr"), -1.0, -1.0, 1.0),
        (LossConfig(objective="sapo"), 1.0, -4.0, 0.0),
    ],
    ids=str,
)
def test_overflowing_ratio_gives_the_limit_not_nan(
    config: LossConfig, advantage: float, loss: float, slope: float
) -> None:
    terms = terms_at(config, 200.0, advantage)
    assert terms.loss.item() == pytest.approx(loss)
    assert terms.d_logp.item() == pytest.approx(slope)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gradient_flows_exactly_at_a_clip_bound_and_stops_beyond(advantage: float) -> None:
    # clip bounds of 0 put the bound at ratio 1 = exp(0), which is exact
    config = LossConfig(clip_low=0.0, clip_high=0.0)
    assert terms_at(config, 0.0, advantage).d_logp.item() == -advantage
    beyond = 1e-6 if advantage > 0 else -1e-6
    assert terms_at(config, beyond, advantage).d_logp.item() == 0
    assert terms_at(config, -beyond, advantage).d_logp.item() == pytest.approx(-advantage, rel=1e-5)


def test_sampler_weights() -> None:
    def weight(log_q: float, **options: object) -> float:
        config = LossConfig(objective="reinforce", **options)
        return terms_at(config, 0.0, -1.0, sampler_logps=torch.tensor([-1.0 - log_q])).d_logp.item()

    bounds = {"sampler_bounds": (0.5, 2.0)}
    assert weight(math.log(1.5), sampler_correction="tis", **bounds) == pytest.approx(1.5)
    assert weight(math.log(0.1), sampler_correction="tis", **bounds) == pytest.approx(0.1)
    assert weight(200.0, sampler_correction="tis", **bounds) == 2.0
    assert weight(math.log(1.5), sampler_correction="icepop", **bounds) == pytest.approx(1.5)
    assert weight(math.log(0.4), sampler_correction="icepop", **bounds) == 0.0
    assert weight(200.0, sampler_correction="icepop", **bounds) == 0.0


def test_impossible_token_is_nan_not_a_silent_zero() -> None:
    logp = torch.tensor([-math.inf, -1.0])
    given = Given(torch.ones(2), torch.full((2,), -1.0), None, None)
    terms = token_terms(LossConfig(), given, logp, torch.zeros(2), None)
    assert terms.loss.isnan().tolist() == [True, False]
    assert terms.d_logp.isnan().tolist() == [True, False]


def test_clipped_counts_only_tokens_that_a_bound_changes() -> None:
    ratio = torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0])
    advantage = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0])
    low, high = clipped(LossConfig(), advantage, ratio)
    assert low.tolist() == [True, False, False, False, False]
    assert high.tolist() == [False, False, False, True, False]
