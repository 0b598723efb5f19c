"""What one token contributes: its loss and the loss's derivatives. The maths of every objective stands here, once.

Every policy loss touches the model only through a token's log-prob, its entropy and its KL. So the gradient of a
token's logits is three coefficients times three fixed rows:
    dL/dz = d_logp * (onehot - p) + d_entropy * dH/dz + d_kl * dKL/dz
`prefixloss.backends.reference` has the same formulas in their plainest form, for autograd; tests hold the two equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss.config import LossConfig, unknown
from prefixloss.inputs.batch import Given


class Terms(NamedTuple):
    """Per token, [n]: the loss before any reduction, its derivatives, and the ratio and KL that went into it."""

    loss: Tensor
    d_logp: Tensor
    d_entropy: Tensor | float
    d_kl: Tensor | float  # with respect to the exact KL; the derivatives of k1, k2, k3 are part of d_logp
    ratio: Tensor
    kl: Tensor


def token_terms(
    config: LossConfig,
    given: Given,
    logp: Tensor,
    entropy: Tensor,
    exact_kl: Tensor | None,
    log_ratio: Tensor | None = None,
) -> Terms:
    """logp, entropy, exact_kl (None unless kl="full"): [n]. log_ratio: the response's mean log ratio, for GSPO."""
    ratio = torch.exp(log_ratio if log_ratio is not None else token_log_ratio(given, logp))
    loss, d_logp = _policy(config, given.advantages, logp, ratio)
    if config.sampler_correction is not None:
        weight = _sampler_weight(config, given, logp)
        # a dropped token counts 0 even if its own loss overflowed
        loss, d_logp = (torch.where(weight == 0, 0.0, weight * x) for x in (loss, d_logp))

    kl, dk_dlogp = torch.zeros_like(logp), torch.zeros_like(logp)
    d_kl: Tensor | float = 0.0
    if config.kl is not None:
        kl, dk_dlogp = _kl(config, given, logp, exact_kl)
    if config.penalises_kl:
        # with importance the term is rho k, and d rho / d logp = rho
        scale = config.kl_coef * ratio if config.kl_importance else torch.full_like(logp, config.kl_coef)
        loss = loss + scale * kl
        d_logp = d_logp + scale * (dk_dlogp + kl if config.kl_importance else dk_dlogp)
        d_kl = scale if config.kl == "full" else 0.0
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy

    # a scored token that the policy cannot produce has no finite log-prob: never a silent 0
    finite = logp > -math.inf
    nan = logp.new_full((), math.nan)
    loss, d_logp = torch.where(finite, loss, nan), torch.where(finite, d_logp, nan)
    return Terms(loss, d_logp, -config.entropy_coef, d_kl, ratio, kl)


def token_log_ratio(given: Given, logp: Tensor) -> Tensor:
    """log rho = logp - old_logp; 0 on policy (old_logps None)."""
    return torch.zeros_like(logp) if given.old_logps is None else logp - given.old_logps


def clipped(config: LossConfig, advantages: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that the objective's own bounds on the ratio hold back, below and above: bool [n] each.

    "clip": below for A < 0, above for A > 0, where the bound ends the gradient. "cispo" caps every ratio; as in TRL and
    Liger those with A > 0 count, which the cap keeps from being raised further. "topr" caps for A < 0 alone. "sapo" and
    "reinforce" have no bound. ratio_cap and dual_clip do not count.
    """
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if config.objective == "clip":
        low = (advantages < 0) & (ratio < 1 - config.clip_low)
        return low, (advantages > 0) & (ratio > 1 + config.clip_high)
    if config.objective == "cispo":
        return never, (advantages > 0) & (ratio > config.clip_high)
    if config.objective == "topr":
        return never, (advantages < 0) & (ratio > 1)
    if config.objective in ("sapo", "reinforce"):
        return never, never
    unknown("objective", config.objective)


def _policy(config: LossConfig, advantages: Tensor, logp: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The objective's loss and d loss / d logp. Where a bound holds the ratio the derivative is exactly 0."""
    a = advantages
    if config.objective == "clip":
        # -min(rho A, clip(rho) A) = -A min(rho, 1 + high) for A >= 0, -A max(rho, 1 - low) for A < 0
        bounded = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        below = bounded.clamp(max=1 + config.clip_high)
        above = bounded.clamp(min=1 - config.clip_low)
        above = above if config.dual_clip is None else above.clamp(max=config.dual_clip)
        bounded = torch.where(a >= 0, below, above)
        return -a * bounded, torch.where(bounded == ratio, -a * ratio, 0.0)
    if config.objective == "cispo":
        weight = ratio.clamp(max=config.clip_high)
        return -weight * a * logp, -weight * a
    if config.objective == "topr":
        weight = torch.where(a > 0, 1.0, ratio.clamp(max=1))
        return -weight * a * logp, -weight * a
    if config.objective == "sapo":
        positive, other = config.sapo_tau
        tau = torch.where(a > 0, a.new_full((), positive), other)
        gate = tau * (ratio - 1)
        # d (4 / tau) sigmoid(tau (rho - 1)) / d logp = 4 sigmoid' rho, which tends to 0 as rho overflows
        slope = 4 * _sigmoid(gate) * _sigmoid(-gate) * ratio.clamp(max=torch.finfo(a.dtype).max)
        return -(4 / tau) * _sigmoid(gate) * a, -slope * a
    if config.objective == "reinforce":
        return -a * logp, -a
    unknown("objective", config.objective)


def _sigmoid(x: Tensor) -> Tensor:
    """torch.sigmoid has other bits for the last few numbers of a tensor than for the rest; exp has not."""
    return 1 / (1 + torch.exp(-x))


def _sampler_weight(config: LossConfig, given: Given, logp: Tensor) -> Tensor:
    """q = exp(old_logp - sampler_logp), capped ("tis") or 0 outside its bounds ("icepop"); a constant."""
    assert given.sampler_logps is not None
    q = torch.exp((logp if given.old_logps is None else given.old_logps) - given.sampler_logps)
    low, high = config.sampler_bounds
    if config.sampler_correction == "tis":
        return q.clamp(max=high)
    if config.sampler_correction == "icepop":
        return torch.where((q >= low) & (q <= high), q, 0.0)
    unknown("sampler_correction", config.sampler_correction)


def _kl(config: LossConfig, given: Given, logp: Tensor, exact_kl: Tensor | None) -> tuple[Tensor, Tensor]:
    """The KL estimate and its derivative with respect to logp (0 for the exact one)."""
    if config.kl == "full":
        assert exact_kl is not None
        return exact_kl, torch.zeros_like(logp)
    assert given.ref_logps is not None
    d = given.ref_logps - logp
    if config.kl == "k1":
        return -d, torch.ones_like(d)
    if config.kl == "k2":
        return d * d / 2, -d
    if config.kl == "k3":
        return torch.expm1(d) - d, -torch.expm1(d)
    unknown("kl", config.kl)
