"""A vocabulary split over processes: each has some columns of every row of logits, and one collective a chunk combines
what they know. `Columns` is the same for one process, so that the back-end has one way through.

A process's columns give sums over the tokens other than the target, relative to their own largest score, so that a
log-prob near 0 keeps its digits however the vocabulary is cut. They are combined in the group's rank order on every
process alike: all of them have the same bits, and take the same rows on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.maths import softmax
from prefixloss.maths.softmax import Coefficients, RowStats, Transform, blocks

# below every score: the largest of no score
_LOWEST = -1e30
# a row's total relative to one process's largest score; more would make 0 * inf of what is 0
_LARGEST = 1e37


class Collective(NamedTuple):
    """What the processes are adding up; on one process it is there."""

    total: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        """The sum, before which nothing may be done with `total`; on a GPU it is the stream that waits."""
        if self.work is not None:
            self.work.wait()
        return self.total


@dataclass(frozen=True)
class Columns:
    """All of the vocabulary is here: `vocabulary` columns, and perhaps padding behind them."""

    vocabulary: int

    @property
    def columns(self) -> int:
        """Of this process, without padding."""
        return self.vocabulary

    @property
    def rows_at_once(self) -> int | None:
        """The chunk's rows, where the processes have to agree on them."""
        return None

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """weight [V, D] and bias [V] without their padding."""
        if len(weight) == self.columns:
            return weight, bias
        return weight[: self.columns], None if bias is None else bias[: self.columns]

    def logits(self, logits: Tensor) -> Tensor:
        """logits [.., V] without their padding."""
        return logits if logits.shape[-1] == self.columns else logits[..., : self.columns]

    def local(self, tokens: Tensor) -> Tensor:
        """Each target's column here; -1 for another process's."""
        return tokens

    def stats(self, scores: Tensor, tokens: Tensor, probs: Tensor, ref_scores: Tensor | None) -> RowStats:
        return softmax.row_stats(scores, tokens, probs, ref_scores)

    def probabilities(self, scores: Tensor, tokens: Tensor, probs: Tensor) -> None:
        softmax.probabilities(scores, probs)

    def gradient_(
        self, probs: Tensor, tokens: Tensor, stats: RowStats, coefficients: Coefficients, transform: Transform,
        ref_scores: Tensor | None = None,
    ) -> None:  # fmt: skip
        softmax.logit_gradient_(probs, tokens, stats, coefficients, transform, ref_scores)

    def begin_sum(self, shares: Tensor) -> Collective:
        """Adds up, over the processes, what each of them has of a gradient of the hidden states; shares may become
        the sum."""
        return Collective(shares)

    def sum_(self, x: Tensor | None) -> None:
        """As `begin_sum`, at once and in place."""


class _Sums(NamedTuple):
    """Of one process's columns, [n]: the largest score without the target's, sum e = exp(s - top), sum e (s - top),
    sum e (s - r) for reference scores r, and their largest and sum with the target's; the target's own two scores, 0
    elsewhere."""

    top: Tensor
    others: Tensor
    shift: Tensor
    gap: Tensor
    ref_top: Tensor
    ref_total: Tensor
    own: Tensor
    ref_own: Tensor


@dataclass(frozen=True)
class Shard(Columns):
    """This process has some columns of the vocabulary, from `first` on: `counts` of each process, without padding.

    rows: as many as fit on each process.
    """

    group: Any
    first: int
    counts: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, group: Any, columns: int, rows: int, device: torch.device, vocab_size: int | None) -> Shard:
        """A collective: every process of the group says how many columns it has, in the order of their ranks, and how
        many rows fit."""
        rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        said = torch.zeros(2, size, dtype=torch.int64, device=device)
        said[:, rank] = torch.tensor([columns, rows], device=device)
        torch.distributed.all_reduce(said, group=group)
        given, fitting = said.tolist()
        whole = sum(given) if vocab_size is None else int(vocab_size)
        if whole > sum(given):
            check.fail("vocab_size", f"{whole} with {sum(given)} columns in the group", "no more than there are")
        first = [sum(given[:i]) for i in range(size)]
        counts = tuple(min(max(whole - start, 0), count) for start, count in zip(first, given, strict=True))
        return cls(whole, group, first[rank], counts, min(fitting))

    @property
    def columns(self) -> int:
        return self.counts[torch.distributed.get_rank(self.group)]

    @property
    def rows_at_once(self) -> int | None:
        return self.rows

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.columns:
            return super().head(weight, bias)
        # nothing but padding: one column that no token has, and that has no probability
        return weight[:1], _never(weight.new_zeros(1) if bias is None else bias[:1])

    def logits(self, logits: Tensor) -> Tensor:
        return super().logits(logits) if self.columns else _never(logits[..., :1])

    def begin_sum(self, shares: Tensor) -> Collective:
        total = shares.contiguous()
        return Collective(total, torch.distributed.all_reduce(total, group=self.group, async_op=True))

    def sum_(self, x: Tensor | None) -> None:
        if x is not None:
            total = self.begin_sum(x).wait()
            if total is not x:
                x.copy_(total)

    def local(self, tokens: Tensor) -> Tensor:
        here, target = self._target(tokens)
        return torch.where(here, target, -1)

    def begin_gather(self, mine: Tensor) -> Collective:
        """Every process's `mine` [..], [processes, ..], by one all-reduce in which each fills a place of its own."""
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        packed = mine.new_zeros(size, *mine.shape)
        packed[rank] = mine
        return self.begin_sum(packed)

    def stats(self, scores: Tensor, tokens: Tensor, probs: Tensor, ref_scores: Tensor | None) -> RowStats:
        """As `softmax.row_stats`; `total` is what this process's part of probs is to be divided by."""
        here, target = self._target(tokens)
        sums = self._sums(scores, here, target, probs, ref_scores)
        parts = _Sums(*self.begin_gather(torch.stack(sums)).wait().unbind(1))
        top = parts.top.amax(0)
        shrink = torch.exp(parts.top - top)
        others = (parts.others * shrink).sum(0)
        shift = ((parts.shift + parts.others * (parts.top - top)) * shrink).sum(0)
        own, ref_own = parts.own.sum(0), parts.ref_own.sum(0)
        odds = top - own + torch.log(others)
        logp = -torch.logaddexp(odds, torch.zeros_like(odds))
        largest = torch.maximum(top, own)
        e, fall = torch.exp(own - largest), torch.exp(top - largest)
        rest = others * fall
        total = e + rest
        log_total = torch.where(own == largest, torch.log1p(rest), torch.log(total))
        own_shift = torch.where(e == 0, 0.0, e * (own - largest))
        entropy = log_total - (own_shift + (shift + others * (top - largest)) * fall) / total
        kl, ref_lse = None, None
        if ref_scores is not None:
            ref_top = parts.ref_top.amax(0)
            ref_lse = ref_top + torch.log((parts.ref_total * torch.exp(parts.ref_top - ref_top)).sum(0))
            own_gap = torch.where(e == 0, 0.0, e * (own - ref_own))
            # a process far below the largest has no share, be its gap infinite (a token the reference bans)
            gaps = torch.where(shrink == 0, 0.0, parts.gap * shrink).sum(0)
            gap = (own_gap + torch.where(fall == 0, 0.0, gaps * fall)) / total
            kl = gap - (largest + log_total - ref_lse)
        here_total = (total * torch.exp(largest - sums.top)).clamp(max=_LARGEST)
        self._put_target(probs, here, target, torch.exp(logp) * here_total)
        return RowStats(logp, largest + log_total, here_total, entropy, kl, ref_lse)

    def probabilities(self, scores: Tensor, tokens: Tensor, probs: Tensor) -> None:
        # the target's own place is filled from its log-prob where it counts, in `gradient_`
        self._sums(scores, *self._target(tokens), probs, None)

    def gradient_(
        self, probs: Tensor, tokens: Tensor, stats: RowStats, coefficients: Coefficients, transform: Transform,
        ref_scores: Tensor | None = None,
    ) -> None:  # fmt: skip
        here, target = self._target(tokens)
        if ref_scores is not None:
            # what is nothing beside the other processes' columns, though the reference may ban it
            probs.masked_fill_((stats.total >= _LARGEST)[:, None], 0)
        self._put_target(probs, here, target, torch.exp(stats.logp) * stats.total)
        softmax.logit_gradient_(probs, target, stats, coefficients, transform, ref_scores, here)

    def _target(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are among this process's columns, and their column (0 for the others)."""
        column = tokens - self.first
        here = (column >= 0) & (column < self.columns)
        return here, torch.where(here, column, 0)

    @staticmethod
    def _put_target(probs: Tensor, here: Tensor, target: Tensor, value: Tensor) -> None:
        index = target[:, None]
        probs.scatter_(1, index, torch.where(here[:, None], value[:, None], probs.gather(1, index)))

    def _sums(self, scores: Tensor, here: Tensor, target: Tensor, probs: Tensor, ref_scores: Tensor | None) -> _Sums:
        """The sums of this process's columns; the e go to probs [n, columns], which may be scores."""
        sums = _Sums(*(scores.new_zeros(len(scores)) for _ in _Sums._fields))
        sums.ref_top.fill_(_LOWEST)
        for rows in blocks(*scores.shape):
            index, mine = target[rows, None], here[rows, None]
            own = scores[rows].gather(1, index)
            sums.own[rows] = torch.where(mine, own, 0.0).squeeze(1)
            s = scores[rows].scatter(1, index, torch.where(mine, -math.inf, own))
            sums.top[rows] = s.amax(1).clamp(min=_LOWEST)
            down = s - sums.top[rows, None]
            e = torch.exp(down, out=probs[rows])
            sums.others[rows] = e.sum(1)
            sums.shift[rows] = down.masked_fill_(e == 0, 0).mul_(e).sum(1)
            if ref_scores is not None:
                r = ref_scores[rows]
                sums.ref_own[rows] = torch.where(mine, r.gather(1, index), 0.0).squeeze(1)
                sums.gap[rows] = (s - r).masked_fill_(e == 0, 0).mul_(e).sum(1)
                sums.ref_top[rows] = r.amax(1).clamp(min=_LOWEST)
                sums.ref_total[rows] = torch.exp(r - sums.ref_top[rows, None]).sum(1)
        return sums


def _never(x: Tensor) -> Tensor:
    """-inf in place of each entry, which gets a gradient of 0."""
    return torch.where(x.new_zeros((), dtype=torch.bool), x, -math.inf)
