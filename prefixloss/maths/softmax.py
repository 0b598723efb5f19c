"""Logits to statistics, and coefficients to logit gradients, row by row, in plain torch.

Scores are the logits of the policy's distribution: softcap(logit_scale * z) / temperature. For a row of scores s with
target t and probabilities p, H the entropy and K the exact KL to the reference q:
    d logp / d s_j = 1[j = t] - p_j
    d H    / d s_j = -p_j (log p_j + H)
    d K    / d s_j =  p_j (log p_j - log q_j - K)
Work goes in blocks of rows that stay in the cache, so that a block's passes cost one read of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss.config import LossConfig

# scores a block: 8 MiB of float32. A block and its temporaries stay in the cache, and every operation on one waits for
# all threads at its end: on a machine that is busy with other work, more and smaller blocks take several times as long
_BLOCK = 2**21
# stands for log 0: its exp is 0 in every dtype, and 0 times it is 0 where 0 * -inf is NaN
_LOG_ZERO = -1e4


@dataclass(frozen=True)
class Transform:
    """softcap(logit_scale * z) / temperature as one factor before the cap and one after it.

    A logit of -inf is a banned token and stays -inf under the cap.
    """

    before: float
    softcap: float | None
    after: float

    @classmethod
    def of(cls, temperature: float, softcap: float | None, logit_scale: float) -> Transform:
        if softcap is None:
            return cls(logit_scale / temperature, None, 1.0)
        return cls(logit_scale, softcap, 1.0 / temperature)

    def cap_(self, scores: Tensor) -> Tensor:
        """The cap and the factor after it, in place, on scores already multiplied by `before`."""
        if self.softcap is not None:
            for rows in blocks(*scores.shape):
                s = scores[rows]
                banned = s == -math.inf
                s.div_(self.softcap).tanh_().mul_(self.softcap * self.after).masked_fill_(banned, -math.inf)
        return scores

    def slope(self, scores: Tensor) -> Tensor:
        """d score / d (before * z) from the scores, with a cap: after * (1 - tanh^2), 0 for banned tokens."""
        assert self.softcap is not None
        tanh = scores / (self.softcap * self.after)
        return tanh.square_().neg_().add_(1).clamp_(min=0).mul_(self.after)


def transform_of(config: LossConfig) -> Transform:
    return Transform.of(config.temperature, config.softcap, config.logit_scale)


class RowStats(NamedTuple):
    """Per row, [n]: log-prob of the target, log sum_j exp(s_j), what the probabilities are to be divided by, entropy,
    and with a reference (else None) the exact KL and the reference's log sum."""

    logp: Tensor
    lse: Tensor
    total: Tensor
    entropy: Tensor
    kl: Tensor | None
    ref_lse: Tensor | None

    def at(self, index: Tensor) -> RowStats:
        picked = [None if x is None else x[index] for x in self]
        return RowStats(*picked)  # type: ignore[arg-type]

    @classmethod
    def empty(cls, rows: int, like: Tensor, exact_kl: bool) -> RowStats:
        """Room for `rows` rows, with or without a reference."""
        made = [like.new_empty(rows) for _ in cls._fields]
        kl, ref_lse = made[4:] if exact_kl else (None, None)
        return cls(made[0], made[1], made[2], made[3], kl, ref_lse)

    def put(self, rows: slice, part: RowStats) -> None:
        for whole, piece in zip(self, part, strict=True):
            if whole is not None and piece is not None:
                whole[rows] = piece


class Coefficients(NamedTuple):
    """Per row, [n]: the loss's derivatives with respect to logp, entropy and exact KL; None where always 0."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None

    def at(self, index: Tensor) -> Coefficients:
        return Coefficients(self.logp[index], *(None if x is None else x[index] for x in self[1:]))

    def times(self, factor: float) -> Coefficients:
        return Coefficients(*(None if x is None else x * factor for x in self))  # type: ignore[arg-type]

    def live(self) -> Tensor:
        """Rows with any gradient: bool [n]."""
        live = self.logp != 0
        for other in (self.entropy, self.kl):
            live = live if other is None else live | (other != 0)
        return live


def blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def row_stats(scores: Tensor, tokens: Tensor, probs: Tensor, ref_scores: Tensor | None = None) -> RowStats:
    """Statistics of scores [n, V] for targets tokens [n].

    The probabilities, whose rows sum to `total` rather than 1, go to probs [n, V], which may be scores.
    """
    n, vocabulary = scores.shape
    target = tokens[:, None]
    top, at_target, others, mean_shifted, kl, ref_lse = (scores.new_empty(n, 1) for _ in range(6))
    # the scores may be overwritten below
    target_shifted = scores.gather(1, target)
    scratch = _scratch(scores)
    for rows in blocks(n, vocabulary):
        s = scores[rows]
        shifted = torch.sub(s, torch.amax(s, 1, keepdim=True, out=top[rows]), out=scratch[: len(s)])
        # not exp2, faster as it is: the last bits of a number depend on its place in a batch
        p = torch.exp(shifted, out=probs[rows])
        torch.gather(p, 1, target[rows], out=at_target[rows])
        # sum() is pairwise; the running sum of torch.softmax loses up to 5 digits over a large vocabulary
        others[rows] = row_sums(p.scatter_(1, target[rows], 0))
        p.scatter_(1, target[rows], at_target[rows])
        if ref_scores is not None:
            ref_lse[rows] = _not_alone(ref_scores[rows]).logsumexp(1, keepdim=True)[: len(s)]
            log_norm = torch.log(others[rows] + at_target[rows])
            log_ratio = (shifted - ref_scores[rows]).add_(ref_lse[rows] - log_norm)
            kl[rows] = row_sums(log_ratio.masked_fill_(p == 0, 0).mul_(p))
        mean_shifted[rows] = row_sums(shifted.mul_(p))

    total = others + at_target
    log_norm = torch.log(total)  # log sum_j exp(s_j - top)
    # log p_t = -log(1 + others / p_t) keeps its digits near 0; far from it, p_t may underflow
    logp = torch.where(others < at_target, -torch.log1p(others / at_target), target_shifted.sub_(top).sub_(log_norm))
    entropy = log_norm - mean_shifted / total
    banned = mean_shifted.isnan() & ~total.isnan()  # a banned token's -inf * 0
    if bool(banned.any()):
        for rows in blocks(n, vocabulary):
            summed = row_sums(torch.special.entr(probs[rows] / total[rows]))
            entropy[rows] = torch.where(banned[rows], summed, entropy[rows])
    columns = (logp, log_norm + top, total, entropy)
    logp, lse, total, entropy = (x.squeeze(1) for x in columns)
    if ref_scores is None:
        return RowStats(logp, lse, total, entropy, None, None)
    return RowStats(logp, lse, total, entropy, kl.squeeze(1) / total, ref_lse.squeeze(1))


def row_sums(x: Tensor) -> Tensor:
    """[n, 1], the sum of each row of x [n, V], whatever the number of rows."""
    return _not_alone(x).sum(1, keepdim=True)[: len(x)]


def _not_alone(x: Tensor) -> Tensor:
    """A single row twice: torch would share the sum over one row out to threads, and so sum in another order."""
    return x.expand(2, -1) if len(x) == 1 else x


def probabilities(scores: Tensor, probs: Tensor) -> None:
    """The probabilities of scores [n, V] once more, as `row_stats` makes them, into probs, which may be scores."""
    scratch = _scratch(scores)
    for rows in blocks(*scores.shape):
        s = scores[rows]
        torch.exp(torch.sub(s, s.amax(1, keepdim=True), out=scratch[: len(s)]), out=probs[rows])


def logit_gradient_(
    probs: Tensor,
    tokens: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    transform: Transform,
    ref_scores: Tensor | None = None,
    here: Tensor | None = None,
) -> Tensor:
    """Overwrites the probabilities of `row_stats` with the gradient of (before * z), coefficients times derivatives.

    here: bool [n], of a vocabulary that is split: whether the target is among these columns; None if all are.
    """
    target = tokens[:, None]
    # 1 - p_t = -expm1(logp) keeps its digits where p_t is near 1
    at_target = coefficients.logp * -torch.expm1(stats.logp)
    penalised = coefficients.entropy is not None or coefficients.kl is not None
    if not penalised and transform.softcap is None:
        probs.mul_(-(coefficients.logp / stats.total)[:, None])
        return _put_target_(probs, target, at_target, here)
    scratch = _scratch(probs)
    for rows in blocks(*probs.shape):
        p, t = probs[rows].div_(stats.total[rows, None]), target[rows]
        log_p = torch.log(p, out=scratch[: len(p)]).clamp_(min=_LOG_ZERO)
        slope = None if transform.softcap is None else transform.slope(log_p + stats.lse[rows, None])
        if penalised:
            rest = _penalty_slope_(log_p, stats, rows, coefficients, ref_scores).masked_fill_(p == 0, 0)
            at_target[rows] += (p.gather(1, t) * rest.gather(1, t)).squeeze(1)
            p.mul_(rest.sub_(coefficients.logp[rows, None]))
        else:
            p.mul_(-coefficients.logp[rows, None])
        if slope is not None:
            # the target's own score, which its probability may be too small to give back
            p.mul_(slope)
            at_target[rows] *= transform.slope(stats.logp[rows] + stats.lse[rows])
        _put_target_(p, t, at_target[rows], None if here is None else here[rows])
    return probs


def _put_target_(gradient: Tensor, target: Tensor, value: Tensor, here: Tensor | None) -> Tensor:
    """The targets' own share, where they are among these columns."""
    value = value[:, None]
    return gradient.scatter_(
        1, target, value if here is None else torch.where(here[:, None], value, gradient.gather(1, target))
    )


def _penalty_slope_(
    log_p: Tensor, stats: RowStats, rows: slice, coefficients: Coefficients, ref_scores: Tensor | None
) -> Tensor:
    """(e dH/ds + k dK/ds) / p = (k - e) log p - k log q - e H - k K, over log_p."""
    e, k = (torch.zeros_like(stats.logp[rows]) if c is None else c[rows] for c in coefficients[1:])
    constant = e * stats.entropy[rows]
    log_p.mul_((k - e)[:, None])
    if coefficients.kl is not None:
        assert ref_scores is not None
        assert stats.kl is not None
        assert stats.ref_lse is not None
        log_p.addcmul_(ref_scores[rows], -k[:, None])
        constant += k * (stats.kl[rows] - stats.ref_lse[rows])
    return log_p.sub_(constant[:, None])


def _scratch(scores: Tensor) -> Tensor:
    """Room for one block's temporaries."""
    return torch.empty_like(scores[: max(1, _BLOCK // scores.shape[1])])


def live_rows(coefficients: Coefficients, stats: RowStats, transform: Transform, tolerance: float) -> Tensor:
    """Rows that the backward takes; with a tolerance, those whose gradient may exceed it times the largest.

    A row's gradient is measured by its L1 norm over the vocabulary, from above and from below:
    sum_j |d logp / d s_j| = 2 (1 - p_t);  sum_j |dH / d s_j| <= 2 H;  sum_j |dK / d s_j| <= 2 K + min(2, sqrt(2 K)),
    the last by Pinsker's inequality. Under a softcap only the target's share is sure to reach the logits.
    """
    live = coefficients.live()
    if tolerance == 0 or len(live) == 0:
        return live
    surprise = coefficients.logp.abs() * -torch.expm1(stats.logp)
    penalty = torch.zeros_like(surprise)
    if coefficients.entropy is not None:
        penalty += 2 * coefficients.entropy.abs() * stats.entropy
    if coefficients.kl is not None and stats.kl is not None:
        kl = stats.kl.clamp(min=0)
        penalty += coefficients.kl.abs() * (2 * kl + (2 * kl).sqrt().clamp(max=2))
    sure = 2 * surprise
    if transform.softcap is not None:
        sure = surprise * transform.slope(stats.logp + stats.lse) / transform.after
    # a row without coefficients has no gradient, whatever its statistics
    largest = (sure - penalty).clamp(min=0).where(live, 0.0).max()
    # beside an infinite gradient none is small: all of an overflowed step has to be seen
    return live & ~((2 * surprise + penalty <= tolerance * largest) & largest.isfinite())


def keep_rows_(scores: Tensor, keep: Tensor) -> Tensor:
    """Moves the rows `keep` [m] (increasing) to the front of scores [n, V], in place, and returns them."""
    for rows in blocks(len(keep), scores.shape[1]):
        # row keep[i] >= i, so no row is overwritten before it is read
        scores[rows] = scores[keep[rows]]
    return scores[: len(keep)]
