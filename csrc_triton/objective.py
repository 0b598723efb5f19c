"""A token's loss and its derivatives on the device: `prefixloss.maths.objective`, scalar for scalar.

`tests/kernels/test_kernels.py` holds the two equal value by value, at every branch point.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .maths import expm1

# what has a device form here; torch makes the loss of all others
POLICIES = ("clip", "cispo", "sapo", "reinforce", "topr")
CORRECTIONS = ("tis", "icepop")
DIVERGENCES = ("k1", "k2", "k3", "full")
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


class ObjectiveKind(NamedTuple):
    """What the kernel is compiled for."""

    policy: str  # one of POLICIES
    off_policy: bool  # old_logps were given
    ratio_cap: bool
    dual_clip: bool
    sampler: str  # "" or one of CORRECTIONS
    kl: str  # "" or one of DIVERGENCES
    kl_penalty: bool
    kl_importance: bool
    entropy_bonus: bool


class Options(NamedTuple):
    """The objective's numbers; a change compiles nothing."""

    clip_low: float  # the lower bound of the ratio itself
    clip_high: float  # the upper bound of the ratio itself
    ratio_cap: float
    dual_clip: float
    tau_positive: float
    tau_other: float
    sampler_low: float
    sampler_high: float
    kl_coef: float
    entropy_coef: float


class TokenInputs(NamedTuple):
    """What is known of a token before the model runs; 0 where not given."""

    advantage: tl.tensor
    weight: tl.tensor  # its share of the reduced loss
    old_logp: tl.tensor
    sampler_logp: tl.tensor
    ref_logp: tl.tensor


class Coefficients(NamedTuple):
    """Derivatives of the loss with respect to log-prob, entropy and exact KL."""

    logp: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor


@triton.jit
def token_terms(given, logp, entropy, exact_kl, options, KIND: tl.constexpr):
    """The token's loss before any reduction, its coefficients, its ratio and its KL. All scalars."""
    zero, one = tl.full([], 0.0, tl.float32), tl.full([], 1.0, tl.float32)
    ratio = one
    if KIND.off_policy:
        ratio = tl.exp(logp - given.old_logp)
    loss, d_logp = policy(given.advantage, logp, ratio, options, KIND)
    if KIND.sampler != "":
        old = logp
        if KIND.off_policy:
            old = given.old_logp
        weight = sampler_weight(tl.exp(old - given.sampler_logp), options, KIND)
        # a dropped token counts 0 even if its own loss overflowed
        loss = tl.where(weight == 0, 0.0, weight * loss)
        d_logp = tl.where(weight == 0, 0.0, weight * d_logp)

    kl, dk_dlogp, d_kl, d_entropy = zero, zero, zero, zero
    if KIND.kl != "":
        kl, dk_dlogp = divergence(given.ref_logp - logp, exact_kl, KIND)
    if KIND.kl_penalty:
        scale = one * options.kl_coef
        if KIND.kl_importance:
            # d (rho k) / d logp = rho (dk / d logp + k)
            scale = options.kl_coef * ratio
            dk_dlogp += kl
        loss += scale * kl
        d_logp += scale * dk_dlogp
        if KIND.kl == "full":
            d_kl = scale
    if KIND.entropy_bonus:
        loss -= options.entropy_coef * entropy
        d_entropy -= options.entropy_coef

    # a scored token that the policy cannot produce has no finite log-prob: never a silent 0
    finite = logp > float("-inf")
    loss = tl.where(finite, loss, float("nan"))
    d_logp = tl.where(finite, d_logp, float("nan"))
    return loss, Coefficients(d_logp, d_entropy, d_kl), ratio, kl


@triton.jit
def policy(a, logp, ratio, options, KIND: tl.constexpr):
    """The objective's loss and d loss / d logp."""
    if KIND.policy == "clip":
        # -min(rho A, clip(rho) A) = -A min(rho, 1 + high) for A >= 0, -A max(rho, 1 - low) for A < 0
        bounded = ratio
        if KIND.ratio_cap:
            bounded = least(bounded, options.ratio_cap)
        above = greatest(bounded, options.clip_low)
        if KIND.dual_clip:
            above = least(above, options.dual_clip)
        bounded = tl.where(a >= 0, least(bounded, options.clip_high), above)
        loss = -a * bounded
        d_logp = tl.where(bounded == ratio, -a * ratio, 0.0)
    elif KIND.policy == "sapo":
        tau = tl.where(a > 0, options.tau_positive, options.tau_other)
        gate = tau * (ratio - 1.0)
        # d (4 / tau) sigmoid(tau (rho - 1)) / d logp = 4 sigmoid' rho, which tends to 0 as rho overflows
        loss = -(4.0 / tau) * tl.sigmoid(gate) * a
        d_logp = -4.0 * tl.sigmoid(gate) * tl.sigmoid(-gate) * least(ratio, LARGEST) * a
    elif KIND.policy == "cispo":
        loss, d_logp = weighted(least(ratio, options.clip_high), a, logp)
    elif KIND.policy == "topr":
        loss, d_logp = weighted(tl.where(a > 0, 1.0, least(ratio, 1.0)), a, logp)
    elif KIND.policy == "reinforce":
        loss, d_logp = weighted(1.0, a, logp)
    else:
        loss, d_logp = a, a
        tl.static_assert(False, f"objective: no kernel knows {KIND.policy}")
    return loss, d_logp


@triton.jit
def weighted(weight, a, logp):
    """-weight A logp, the weight a constant."""
    return -weight * a * logp, -weight * a


@triton.jit
def sampler_weight(q, options, KIND: tl.constexpr):
    """q = exp(old_logp - sampler_logp), capped ("tis") or 0 outside its bounds ("icepop"); a constant."""
    weight = q
    if KIND.sampler == "tis":
        weight = least(q, options.sampler_high)
    elif KIND.sampler == "icepop":
        weight = tl.where((q >= options.sampler_low) & (q <= options.sampler_high), q, 0.0)
    else:
        tl.static_assert(False, f"sampler_correction: no kernel knows {KIND.sampler}")
    return weight


@triton.jit
def divergence(d, exact_kl, KIND: tl.constexpr):
    """The KL estimate from d = ref_logp - logp, and its derivative with respect to logp (0 for the exact one)."""
    kl, slope = exact_kl, tl.full([], 0.0, tl.float32)
    if KIND.kl == "k1":
        kl, slope = -d, tl.full([], 1.0, tl.float32)
    elif KIND.kl == "k2":
        kl, slope = d * d * 0.5, -d  # a division would be approximate on a GPU
    elif KIND.kl == "k3":
        kl, slope = expm1(d) - d, -expm1(d)
    else:
        tl.static_assert(KIND.kl == "full", f"kl: no kernel knows {KIND.kl}")
    return kl, slope


@triton.jit
def least(x, bound):
    """min that keeps NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def greatest(x, bound):
    """max that keeps NaN."""
    return tl.where(x < bound, bound, x)
