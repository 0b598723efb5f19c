"""Functions that Triton lacks, exact to rounding where the plain formula cancels."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# exp2 of it is 0, and 0 times it is 0, where 0 * -inf would be NaN
LOG_ZERO: tl.constexpr = tl.constexpr(-1e4)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    small = u == 1.0
    # an infinite x has no quotient
    return tl.where(small, x, tl.where(u > 1e30, tl.log(u), tl.log(u) * (x / tl.where(small, 1.0, u - 1.0))))


@triton.jit
def expm1(x):
    """exp(x) - 1: whatever error u carries, log(u) carries too."""
    u = tl.exp(x)
    near = (u == 1.0) | (u - 1.0 == -1.0) | (u > 1e30)
    quotient = (u - 1.0) * (x / tl.where(near, 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(near, u - 1.0, quotient))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), with relative accuracy where it is near 0."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2 x)), and where that cancels a polynomial (Cephes, tanhf): relative accuracy near 0 too."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E))))


@triton.jit
def power_of_two(n):
    """2^n for whole n up to 127, to the bit where it is a normal number: exp2 is approximate on a GPU."""
    normal = n >= -126.0
    exponent = tl.where(normal, n, 0.0).to(tl.int32) + 127
    return tl.where(normal, (exponent << 23).to(tl.float32, bitcast=True), tl.exp2(n))
