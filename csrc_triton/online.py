"""The sum of exponentials of a row that is read once: each lane has a running maximum, and its sum relative to it."""

import triton
import triton.language as tl

from .maths import LOG2_E, LOG_ZERO
from .softmax import total_of


@triton.jit
def add_exponentials(top, total, z, kappa):
    """A block of z [LANES, VECTOR] into tops and totals [LANES]: both anew, e, and what older sums shrank by."""
    k = kappa * LOG2_E
    higher = tl.maximum(top, tl.max(z, 1))
    shrink = tl.exp2(tl.maximum((top - higher) * k, LOG_ZERO))
    # NaN has to reach the sums: a maximum that drops it would hide it
    e = tl.exp2(tl.maximum((z - higher[:, None]) * k, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL))
    return higher, total * shrink + tl.sum(e, 1), e, shrink


@triton.jit
def merge_exponentials(tops, totals, kappa):
    """The lanes as one: top and total (scalars), and what each lane's sums shrink by."""
    top = tl.max(tops, 0)
    shrink = tl.exp2(tl.maximum((tops - top) * (kappa * LOG2_E), LOG_ZERO))
    return top, total_of(totals * shrink, totals), shrink
