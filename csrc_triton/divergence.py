"""A divergence between two distributions on the device: `prefixloss.maths.divergence`, class for class.

`tests/kernels/test_distill_kernels.py` holds the two equal, value by value.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

NAMES = ("reverse", "forward", "jsd", "skew-forward", "skew-reverse")
# those that have no mixture of both distributions in them
UNMIXED = ("reverse", "forward")
# the smallest normal number: below it probabilities weigh nothing
SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def class_terms(a, b, beta, NAME: tl.constexpr):
    """From log p and log q, of classes or blocks of them: the divergence's terms, w, and p.

    d D / d s_j = w_j - p_j sum w.
    """
    p, q = tl.exp(a), tl.exp(b)
    if NAME == "reverse":
        terms = kl_terms(a, b, p)
        slope = terms
    elif NAME == "forward":
        terms = kl_terms(b, a, q)
        slope = -q
    else:
        m = tl.maximum(beta * q + (1.0 - beta) * p, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
        log_m = tl.log(m)
        # a probability of 0 has a logarithm of -inf
        from_p = tl.where(p == 0, 0.0, p * (a - log_m))
        from_q = tl.where(q == 0, 0.0, q * (b - log_m))
        if NAME == "jsd":
            slope = (1.0 - beta) * from_p
            terms = beta * from_q + slope
        elif NAME == "skew-forward":
            terms = from_q
            slope = (beta - 1.0) * (p / m) * q
        else:
            tl.static_assert(NAME == "skew-reverse", f"divergence: no kernel knows {NAME}")
            terms = from_p
            slope = from_p - (1.0 - beta) * (p / m) * p
    return terms, slope, p


@triton.jit
def kl_terms(a, b, p):
    """p (log p - log q); infinite where q has not what p has."""
    return tl.where(a == float("-inf"), 0.0, tl.where(b == float("-inf"), float("inf"), p * (a - b)))


def largest_slope(name: str, beta: float) -> float:
    """What no |d D / d s_j| exceeds; for "reverse" 2 D more.

    |p (log p - log q - D)| <= 1 + 2 D, and |p - q| <= 1. With m, |p log (p / m)| <= 1 - log(1 - beta) and
    p (1 - beta) / m <= 1, so |w| <= 2 - log(1 - beta), and |sum w| likewise.
    """
    return 1.0 if name in UNMIXED else 2 * (2 - math.log1p(-beta))
