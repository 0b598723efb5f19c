"""Objectives that torch makes on every back-end: numbers by hand, and the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, call_with_grads, packed, small_case, solve_with_grads, without_ref

from prefixloss import LossConfig, prefix_loss
from prefixloss.maths import objectives

# of few tokens
CHOICE: dict[str, Any] = {"m2_threshold": 0.13, "cov_share": 0.3, "cov_bounds": (0.05, 1.0)}
NEW = tuple(name for name in objectives.BY_NAME if name not in OBJECTIVES)
HALF = math.log(0.5)
GMPO = {"objective": "gmpo", "clip_low": 0.4, "clip_high": 0.4}
# By hand, for a token of probability 1/2: the options, two tokens' log rho and advantages, their losses, and the
# derivatives of the losses' sum by each log-prob.
VECTORS: list[tuple[dict[str, Any], list[float], list[float], list[float], list[float]]] = [
    # held at (0.4, -0.2): the mean is 0.1, and only the second moves it, by half in each of the two losses
    (
        {"objective": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
        [0.5, -0.2],
        [1.0, 1.0],
        [-1.105171] * 2,
        [0, -1.105171],
    ),
    # for A < 0 held from below: (0.5, -0.4), mean 0.05; the first alone moves it
    (
        {"objective": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
        [0.5, -0.9],
        [-2.0, -2.0],
        [2.102542] * 2,
        [2.102542, 0],
    ),
    # w = e^0.3 = 1.349859: phi = exp(3 + 0.6 - 4.049576) = 0.637899; loss phi log 2
    ({"objective": "vespo"}, [0.5, -0.2], [1.0, 1.0], [0.442158] * 2, [-0.637899] * 2),
    # for A < 0: phi = exp(2 + 0.9 - 2.699718) = 1.221747
    ({"objective": "vespo"}, [0.5, -0.2], [-1.0, -1.0], [-0.846851] * 2, [1.221747] * 2),
    # old probability 1/4, TV 1/4: beyond 0.15 where the step leads away (A > 0), not where it leads back
    ({"objective": "dppo-tv"}, [math.log(2)] * 2, [1.0, -1.0], [0.0, 2.0], [0.0, 2.0]),
    # the same by its KL: 0.25 log 0.5 + 0.75 log 1.5 = 0.130812, within 0.15 and beyond 0.13
    ({"objective": "dppo-kl"}, [math.log(2)] * 2, [1.0, -1.0], [-2.0, 2.0], [-2.0, 2.0]),
    ({"objective": "dppo-kl", "divergence_cap": 0.13}, [math.log(2)] * 2, [1.0, -1.0], [0.0, 2.0], [0.0, 2.0]),
    # second moments 0.01 and 0.09, their mean 0.05, that of the first 0.01; and 0.025 of 0.01 and 0.04
    ({"objective": "m2po"}, [0.1, -0.3], [1.0, 1.0], [-1.105171, 0.0], [-1.105171, 0.0]),
    ({"objective": "m2po"}, [0.1, -0.2], [1.0, 1.0], [-1.105171, -0.818731], [-1.105171, -0.818731]),
    # of one log-prob, so without covariance: none within the bounds, and two of the largest
    ({"objective": "clip-cov"}, [0.1, 0.5], [1.0, 1.0], [-1.105171, -1.2], [-1.105171, 0.0]),
    ({"objective": "kl-cov"}, [0.5, -0.2], [1.0, 1.0], [-1.148721, -0.618731], [-0.648721, -1.818731]),
    ({"objective": "kl-cov", "cov_kl_coef": 2.0}, [0.5, 0.0], [1.0, -1.0], [-0.648721, 1.0], [0.351279, 1.0]),
]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("options", "log_ratio", "advantages", "losses", "slopes"), VECTORS, ids=str)
def test_numbers_by_hand(
    options: dict[str, Any], log_ratio: list[float], advantages: list[float], losses: list[float], slopes: list[float],
    backend: str,
) -> None:  # fmt: skip
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    old = HALF - torch.tensor([log_ratio])
    config = LossConfig(reduction="none", **options)
    out = prefix_loss(
        logits, torch.zeros(1, 2).long(), torch.tensor([advantages]), old_logps=old, config=config, backend=backend
    )
    out.loss.sum().backward()
    torch.testing.assert_close(out.loss, torch.tensor([losses]), rtol=1e-5, atol=1e-6)
    # d logp / d its logit = 1 - p
    torch.testing.assert_close(logits.grad[..., 0] / 0.5, torch.tensor([slopes]).float(), rtol=1e-5, atol=1e-6)


# covariances 2 * 0.843, 2 * 1.354 and 0 twice: advantages less 1, log-probs less their mean -0.948
CHANCES, CREDIT = [0.9, 0.1, 0.5, 0.5], [3.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({"objective": "clip-cov", "cov_share": 0.25}, [-3.3, 0.0, -1.1, -1.1]),
        ({"objective": "clip-cov", "cov_share": 0.5}, [0.0, 0.0, -1.1, -1.1]),
        ({"objective": "clip-cov", "cov_share": 0.5, "cov_bounds": (2.0, 3.0)}, [-3.3, 0.0, -1.1, -1.1]),
        ({"objective": "clip-cov", "cov_bounds": (1.0, 2.0)}, [0.0, 1.1, -1.1, -1.1]),
        # what the clip holds is not open to it
        ({"objective": "clip-cov", "cov_share": 0.5, "clip_high": 0.05}, [-3.15, 0.0, -1.05, -1.05]),
        ({"objective": "kl-cov"}, [-3.3, 1.1 + math.log(1.1), -1.1, -1.1]),
        ({"objective": "kl-cov", "cov_share": 0.5}, [-3.3 + math.log(1.1), 1.1 + math.log(1.1), -1.1, -1.1]),
    ],
    ids=str,
)
def test_tokens_are_chosen_by_their_covariance(options: dict[str, Any], losses: list[float], backend: str) -> None:
    p = torch.tensor([CHANCES])
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    out = prefix_loss(
        logits, torch.zeros(1, 4).long(), torch.tensor([CREDIT]), old_logps=(p / 1.1).log(),
        config=LossConfig(reduction="none", **options), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, torch.tensor([losses]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("share", "kept"), [(0.5, [0, 0, 1, 1]), (0.2, [0, 0, 1, 0]), (0.75, [0, 1, 1, 1])])
def test_only_the_tokens_of_the_largest_entropy_learn(share: float, kept: list[int], backend: str) -> None:
    """Entropies 0.325, 0.500, 0.693, 0.673: the quantiles at 0.5, 0.8 and 0.25 are 0.587, 0.681 and 0.457."""
    p = torch.tensor([[0.9, 0.2, 0.5, 0.4]])
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    config = LossConfig(objective="reinforce", reduction="none", top_entropy_quantile=share)
    out = prefix_loss(logits, torch.zeros(1, 4).long(), torch.ones(1, 4), config=config, backend=backend)
    torch.testing.assert_close(out.loss, -p.log() * torch.tensor([kept]), rtol=1e-5, atol=1e-6)


# log rho of two responses, the last token not scored
APART = [[-0.044, 0.236, 0.284, -0.334, 0.507, -0.268], [-0.107, 0.37, 0.041, -0.505, 0.095, 0.04]]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.04, [[1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0]]), (0.01, [[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]])],
)
def test_m2po_keeps_the_tokens_that_areal_keeps(threshold: float, kept: list[list[int]], backend: str) -> None:
    """kept: what the mask of AReaL's `areal/trainer/ppo/actor.py` (4aef98d) says of these tokens."""
    logits, apart = torch.zeros(2, 6, 2), torch.tensor(APART)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 5] = False
    config = LossConfig(objective="m2po", m2_threshold=threshold, reduction="none")
    advantages = torch.tensor([1.0, -0.5])
    out = prefix_loss(
        logits, torch.zeros(2, 6).long(), advantages, mask=mask, old_logps=HALF - apart, config=config, backend=backend
    )
    want = -apart.exp() * advantages[:, None] * torch.tensor(kept)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)


def test_each_new_objective_has_a_vector() -> None:
    assert {options["objective"] for options, *_ in VECTORS} == set(NEW)


@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"reduction": "none"},
        {"kl": "k3", "kl_coef": 0.2, "sampler_correction": "tis"},
        {"stats": "scored"},
        {"top_entropy_quantile": 0.37},
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", NEW)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", None), ("torch", None), ("triton", torch.float32)])
def test_every_back_end_agrees_with_the_oracle(
    backend: str, dtype: Any, objective: str, more: dict[str, Any], level: str
) -> None:
    case = without_ref(small_case(level, objective=objective, clip_low=0.3, clip_high=0.3, **CHOICE, **more))
    # no two tokens' ratios are alike: which of equals are chosen is rounding's to say
    case.old_logps = case.old_logps + 0.003 * torch.arange(12).reshape(3, 4)
    if "kl" in more:
        case.ref_logps = case.old_logps + 0.1
    case.advantages[0] = 0
    case.advantages[1, 1] = 0
    case = packed(case) if level == "logits" else case
    want, want_grads = solve_with_grads(case)
    got, grads = call_with_grads(case, backend, dtype=dtype)
    near = {"rtol": 1e-9, "atol": 1e-11} if dtype is None else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(got.loss.double(), want.loss.detach().reshape(got.loss.shape), **near)
    assert torch.equal(got.learning.reshape(-1), want.learning)
    assert float(got.metrics["clip_high"]) == pytest.approx(want.metrics["clip_high"])
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], **near)


@pytest.mark.parametrize("objective", NEW)
def test_on_policy_the_gradient_is_reinforce_s(objective: str) -> None:
    """At ratio 1 every one of them, with equal advantages in a response, is A d logp (times exp(0) = phi(1) = 1)."""
    case = without_ref(small_case("linear")).but(old_logps=None)
    case.advantages = case.advantages[:, :1].expand(3, 4).clone()
    options = {"reduction": "seq-mean-token-mean"}
    _, grads = call_with_grads(case, "torch", objective=objective, **options)
    _, want = call_with_grads(case, "torch", objective="reinforce", **options)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name])
