"""A row of logits: its statistics in one pass, its gradient in another. The twin of `prefixloss.maths.softmax`.

    z = x, or softcap * tanh(before * x / softcap);  score s = kappa * z;  p = softmax(s)
    logp = -log(1 + sum over the other tokens of exp(s_j - s_target))
    H    = log(total) - mean_p(s - top)        with total = sum of exp(s - top)
    K    = mean_p(s - r) - log sum exp(s) + log sum exp(r), r the scores of the reference
    d logp / d s_j = 1[j = target] - p_j
    d H    / d s_j = -p_j (s_j - top - mean_p(s - top))
    d K    / d s_j =  p_j (s_j - r_j - mean_p(s - r))

A block is [LANES, VECTOR]: every lane keeps a running maximum and sums of its own (an online softmax), and its VECTOR
neighbouring logits are one 16-byte load, so that the loop over a row needs no exchange between threads. The target is
left out of the running sums and added at the end: near p = 1 its sum would swallow the others'.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .maths import LN_2, LOG2_E, LOG_ZERO, log1p, softplus, tanh

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


class LogitScaling(NamedTuple):
    """softcap(logit_scale * x) / temperature: `before` x is capped at `softcap`; scores are `kappa` z.

    slope = d s / d x without the cap's own derivative.
    """

    before: float
    softcap: float
    kappa: float
    slope: float


class Lanes(NamedTuple):
    """Running sums of each lane, over z relative to the lane's top: sum e, sum e (z - top) kappa log2(e), and with a
    reference sum e (z - r), the reference's top and its sum e."""

    top: tl.tensor
    total: tl.tensor
    shift: tl.tensor
    gap: tl.tensor
    ref_top: tl.tensor
    ref_total: tl.tensor


class Statistics(NamedTuple):
    """A row's results: log-prob, entropy, exact KL; top and total make probabilities again; shift = mean_p(s - top),
    gap = mean_p(s - r); others = 1 - p_target."""

    logp: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor
    top: tl.tensor
    total: tl.tensor
    shift: tl.tensor
    gap: tl.tensor
    others: tl.tensor


@triton.jit
def capped(x, transform, SOFTCAP: tl.constexpr):
    """z; a banned token's -inf stays -inf."""
    z = x
    if SOFTCAP:
        z = tl.where(x == float("-inf"), x, transform.softcap * tanh(x * (transform.before / transform.softcap)))
    return z


@triton.jit
def no_lanes(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return Lanes(zero + LOWEST, zero, zero, zero, zero + LOWEST, zero)


@triton.jit
def add_block(lanes, z, ref, kappa, REFERENCE: tl.constexpr):
    """Takes a block of z (and the reference's) [LANES, VECTOR] into the running sums; -inf counts for nothing."""
    k = kappa * LOG2_E
    top = tl.maximum(lanes.top, tl.max(z, 1))
    fall = tl.maximum((lanes.top - top) * k, LOG_ZERO)
    shrink = tl.exp2(fall)
    # NaN has to reach the sums: a maximum that drops it would hide it
    down = tl.maximum((z - top[:, None]) * k, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(down)
    total = lanes.total * shrink + tl.sum(e, 1)
    shift = (lanes.shift + lanes.total * fall) * shrink + tl.sum(e * down, 1)
    gap, ref_top, ref_total = lanes.gap, lanes.ref_top, lanes.ref_total
    if REFERENCE:
        gap = shrunk(gap, shrink) + tl.sum(tl.where(e == 0, 0.0, e * (z - ref)), 1)
        ref_top = tl.maximum(lanes.ref_top, tl.max(ref, 1))
        ref_down = tl.maximum((ref - ref_top[:, None]) * k, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        ref_total = lanes.ref_total * tl.exp2((lanes.ref_top - ref_top) * k) + tl.sum(tl.exp2(ref_down), 1)
    return Lanes(top, total, shift, gap, ref_top, ref_total)


@triton.jit
def shrunk(gap, shrink):
    """What has come to weigh nothing counts for nothing, were its gap infinite."""
    return tl.where(shrink == 0, 0.0, gap * shrink)


@triton.jit
def merge_lanes(lanes, kappa):
    """The lanes' sums as one lane's (scalars)."""
    k = kappa * LOG2_E
    top = tl.max(lanes.top, 0)
    fall = tl.maximum((lanes.top - top) * k, LOG_ZERO)
    shrink = tl.exp2(fall)
    ref_top = tl.max(lanes.ref_top, 0)
    ref_fall = tl.exp2((lanes.ref_top - ref_top) * k)
    return Lanes(
        top,
        total_of(lanes.total * shrink, lanes.total),
        total_of((lanes.shift + lanes.total * fall) * shrink, lanes.total),
        total_of(shrunk(lanes.gap, shrink), lanes.total),
        ref_top,
        total_of(lanes.ref_total * ref_fall, lanes.ref_total),
    )


@triton.jit
def total_of(shares, total):
    """The sum of lanes' shares; a lane whose total is 0 has none.

    The choice stands between product and sum, which would be fused otherwise: two threads that exchange a and b would
    round a + b differently, and hold, and write to one place, two different sums.
    """
    return tl.sum(tl.where(total == 0, 0.0, shares), 0)


@triton.jit
def finish(lane, z, ref, kappa, REFERENCE: tl.constexpr):
    """Statistics from the sums over the other tokens and the target's own z (and the reference's). All scalars.

    The reference's sums have the target in them.
    """
    # the log-odds of the others, and -log(1 + exp(.)) of them
    odds = (lane.top - z) * kappa + tl.log(lane.total)
    # odds - odds is NaN where they are infinite: a target of inf, or nothing but -inf
    logp = tl.where(lane.total == 0, z - z, -softplus(odds) + tl.where(odds == float("-inf"), odds - odds, 0.0))

    top = tl.maximum(lane.top, z, propagate_nan=tl.PropagateNan.ALL)
    own = tl.maximum((z - top) * kappa * LOG2_E, LOG_ZERO)
    fall = tl.maximum((lane.top - top) * kappa * LOG2_E, LOG_ZERO)
    e, shrink = tl.exp2(own), tl.exp2(fall)
    rest = lane.total * shrink
    total = e + rest
    shift = LN_2 * (e * own + (lane.shift + lane.total * fall) * shrink) / total
    log_total = tl.where(z == top, log1p(rest), tl.log(total))
    kl, gap = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    if REFERENCE:
        own_gap = tl.where(e == 0, 0.0, e * (z - ref))
        gap = kappa * (own_gap + shrunk(lane.gap, shrink)) / total
        kl = gap - ((top - lane.ref_top) * kappa + log_total - tl.log(lane.ref_total))
    return Statistics(logp, log_total - shift, kl, top, total, shift, gap, rest / total)


@triton.jit
def block_gradient(x, ref, stats, coefficients, transform, SOFTCAP: tl.constexpr, PENALTY: tl.constexpr,
                   REFERENCE: tl.constexpr):  # fmt: skip
    """d loss / d x for a block of logits, as if none were the target."""
    z = capped(x, transform, SOFTCAP)
    down = z - stats.top
    probs = tl.exp2(down * (transform.kappa * LOG2_E))
    scale = transform.slope / stats.total
    if PENALTY:
        rest = penalty_slope(z, down, ref, stats, coefficients, transform.kappa, REFERENCE)
        grads = probs * tl.where(probs == 0, 0.0, rest - coefficients.logp) * scale
    else:
        grads = probs * (-coefficients.logp * scale)
    if SOFTCAP:
        grads = tl.where(probs == 0, 0.0, grads * cap_slope(z, transform))
    return grads


@triton.jit
def target_gradient(z, ref, stats, coefficients, transform, SOFTCAP: tl.constexpr, PENALTY: tl.constexpr,
                    REFERENCE: tl.constexpr):  # fmt: skip
    """d loss / d x of the target: its log-prob's share is 1 - p, not -p."""
    grad = coefficients.logp * stats.others
    if PENALTY:
        down = z - stats.top
        prob = tl.exp2(down * (transform.kappa * LOG2_E)) / stats.total
        rest = penalty_slope(z, down, ref, stats, coefficients, transform.kappa, REFERENCE)
        grad += tl.where(prob == 0, 0.0, prob * rest)
    grad = grad * transform.slope
    if SOFTCAP:
        grad = grad * cap_slope(z, transform)
    return grad


@triton.jit
def penalty_slope(z, down, ref, stats, coefficients, kappa, REFERENCE: tl.constexpr):
    """(e dH/ds + k dK/ds) / p, e and k the coefficients of entropy and KL; down = z - top."""
    rest = coefficients.entropy * stats.shift - (coefficients.entropy * kappa) * down
    if REFERENCE:
        rest += (coefficients.kl * kappa) * (z - ref) - coefficients.kl * stats.gap
    return rest


@triton.jit
def cap_slope(z, transform):
    """1 - tanh^2 from z = softcap * tanh."""
    t = z * (1.0 / transform.softcap)
    return 1.0 - t * t
