"""What a gradient tolerance bounds, means and costs; the choice of the entries is the back-ends'.

A trained policy's logit gradient is nearly empty: most tokens are nearly certain, and most of a row's softmax lies far
below the rounding of the result. Two options leave that out, and 0, which is exact, is the default of both:
`gradient_tolerance` for the gradient of the hidden states, `head_gradient_tolerance` for that of the head and its bias.

What a tolerance bounds. Let G be the logit gradients of a chunk of n tokens, g_i its rows, and dG what is left out of
it. Then for every row |dg_i| <= tolerance * sqrt(sum_k |g_k|^2 / n) in Euclidean norm, the root mean square of the
chunk's row norms; so |dG| <= tolerance * |G| in Frobenius norm, in each chunk and so in all of them. Entries leave a
row in the order of their size, the smallest first. (A bound by each row's own norm would keep all of the tail of
tokens that are nearly certain and weigh nothing; one on absolute sums would keep the diffuse tail of the others.)

What that means for the gradients. d hidden = G W and d W = G^T H, so their errors are dG W and dG^T H: at most |dG|
times the largest singular value of W, or of H. On a head like a trained policy's the head's error was as large beside
its gradient as dG beside G, that of the hidden states twice as large with a vocabulary of 32,768 and four times with
151,936 (`python -m bench.speed.policy_like`): what leaves a row as a wide tail has one sign and adds up. Ten times have
been seen in a narrow model (D = 64) that is unsure of its tokens; where that matters, ask for less. With
`row_tolerance`, which leaves out whole rows before their logits are made again, both bounds hold, each for its part.

What is put in its place. In the hidden states' gradient the sum of what was left out of a row, times the head's mean
row, is added: a product with one row. Where a head's rows share a direction the tail, which has one
sign, adds up along it: with a shared part half as large as a row the error was 2.3e-3 without and 3.0e-4 with it, and
3.0e-4 either way where there is none. For the head nothing of the kind paid (`bench/NOTES.md`).

What it costs. A gradient of the head has rows that are exactly 0: of tokens that were too improbable everywhere. An
optimiser that divides by the gradient's size, as Adam does, would have moved these as far as any other row for the
tiny number that there was. That is why the head has an option of its own. What a token's result is depends on its
chunk, and so on the batch.

"auto" is meant to keep a gradient's own error within a quarter of what rounding to its dtype makes: numbers spread
evenly over their logarithms are moved by eps * sqrt(E[1 / m^2] / 12) of their size in the root mean square, m being the
mantissa in [1, 2), E[1 / m^2] = 3 / (8 log 2): 0.212 eps. A quarter of it is 4.1e-4 for bfloat16, and bounds |dG| / |G|
of the head. For the hidden states it is divided by the root of V / 16,384 where the vocabulary is larger. That is a fit
to what was measured, not derived: on a head made by formula their error was 1.9 times |dG| / |G| with V = 32,768 and
4.0 times with 151,936, and the root of V grows as much between the two (`bench/NOTES.md`). No other vocabulary and no
trained head was measured.
"""

from __future__ import annotations

import math

import torch

# the largest vocabulary at which "auto" is the same for both products
_SHORT = 2**14
# of a bound, kept for the rounding of float32 sums over a row
MARGIN = 1 - 2.0**-10


def resolved(tolerance: float | str, dtype: torch.dtype) -> float:
    """The number; for "auto" what a gradient of that dtype allows."""
    if isinstance(tolerance, str):
        return torch.finfo(dtype).eps * math.sqrt(3 / (8 * math.log(2)) / 12) / 4
    return tolerance


def of_products(
    asked: tuple[float | str, float | str],
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool],
    vocabulary: int,
) -> tuple[float, float]:
    """The numbers, of the products for the hidden states and for the head, which have these dtypes; 0 for a gradient
    that nobody wants."""
    hidden, head = (resolved(t, dtype) for t, dtype in zip(asked, dtypes, strict=True))
    if asked[0] == "auto":
        hidden *= min(1.0, math.sqrt(_SHORT / vocabulary))
    return hidden if wanted[0] else 0.0, head if wanted[1] else 0.0


def smallest_usable(vocabulary: int, dtype: torch.dtype) -> float:
    """Of the squares that may leave a row: what is so small that its squares vanish is no measure."""
    return vocabulary * torch.finfo(dtype).tiny / (1 - MARGIN)
