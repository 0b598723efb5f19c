"""The products of a chunk's few entries that are worth one, by the kernels; see `prefixloss.backends.tolerance`.

The root mean square of the chunk's row norms is taken from below: a row's gradient is at least as large as its target's
entry, and at most 1.4 times where only log-probs count. So nothing but one logit a row is read before entries are
chosen, the bound holds, and a little less than it allows is left out.

Which products are taken depends on how many entries stay: the host waits for that once a chunk. Where it must not wait,
and for products in float16, whose sums are scaled, nothing is left out. Letters: n rows, m entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss._kernels import entries, rows
from prefixloss._kernels.problem import Problem
from prefixloss.backends import memory
from prefixloss.backends.columns import Shard
from prefixloss.backends.sparse import Entries
from prefixloss.backends.tolerance import MARGIN, of_products, smallest_usable
from prefixloss.backends.triton.chunks import Chunk, HeadChunks
from prefixloss.config import LossConfig
from prefixloss.maths.precision import storage_dtype

# a dense product takes so many entries in the time of one by itself, which reads a row of the other matrix
_DENSE = 250
# of a chunk's rows, one in so many may have no room for their lists before all of them are multiplied
_OVERFLOWS = 8
# entries, of 16 bytes, that wait for those of other chunks
_KEPT = 2**23


class Lists(NamedTuple):
    """What `launch_select` made: columns int32 and values float32 [n, CAPACITY], counts int32 [n], sums [3, n]."""

    columns: Tensor
    values: Tensor
    counts: Tensor
    sums: Tensor


class Chosen(NamedTuple):
    """Lists whose lengths are known: those that fit, how many entries these have, and the rows [k] that have none
    because they are too long."""

    lists: Lists
    entries: int
    others: Tensor


class SparseProducts:
    """Chooses the entries of chunk after chunk, multiplies them, and knows what was left out."""

    def __init__(self, chunks: HeadChunks, tolerances: tuple[float, float]) -> None:
        self.chunks, self.tolerances = chunks, tolerances
        self.left: list[Tensor] = []  # a chunk and product each, [2]: the squares left out, and of all there is
        self.mean_row: Tensor | None = None
        self.few: list[Entries] = []  # for the head, by chunk; a row is a token
        self.kept = 0

    @classmethod
    def wanted(cls, chunks: HeadChunks, config: LossConfig, needs: list[bool], waits: bool) -> SparseProducts | None:
        """None where everything is exact, as with a head that is split over processes."""
        if chunks.size == 0 or chunks.scaled or not waits or isinstance(chunks.columns, Shard):
            return None
        dtypes = chunks.head.hidden.dtype, chunks.head.weight.dtype
        asked = config.gradient_tolerance, config.head_gradient_tolerance
        tolerances = of_products(asked, dtypes, (needs[0], needs[1] or needs[2]), chunks.vocabulary)
        return cls(chunks, tolerances) if max(tolerances) > 0 else None

    def add_gradient(
        self, chunk: Chunk, problem: Problem, stats: Tensor, coefficients: Tensor, grads: Tensor, splits: int
    ) -> None:
        """Takes in the gradient of a chunk; grads: room for all of it, over the logits, if it is needed."""
        work = problem.work._replace(terms=False, gradient=True)
        problem = replace(problem, work=work)
        chosen = self._chosen(problem, stats, coefficients)
        for_hidden, for_head = (chosen.get(t) for t in self.tolerances)
        for some in (for_hidden, for_head):
            if some is not None:
                self.left.append(some.lists.sums[:2].sum(1))
        if for_hidden is not None and self.chunks.d_hidden is not None:
            out = self._hidden_gradient(for_hidden)
            for at, dense in self._overflow(for_hidden, problem, stats, coefficients):
                out[at] = self.chunks.hidden_gradient(dense, len(at), None)
            self.chunks.put_summed(self.chunks.d_hidden, chunk.rows, out)
        if for_head is not None:
            self._keep(for_head, chunk.rows)
            for at, dense in self._overflow(for_head, problem, stats, coefficients):
                self.chunks.add_head_gradient(dense, chunk.room.hidden[at], None)
        if for_hidden is None or for_head is None:
            rows.launch_gradient(problem, stats, coefficients, grads[: problem.rows], stats, splits)
            self.chunks.add_gradient(chunk, grads, for_hidden is None, for_head is None)

    def finish(self) -> Tensor:
        """Adds what waits to the head's gradient; |dG| / |G|, the largest of the chunks and of both products, 0-d."""
        self._add_few(last=True)
        if not self.left:
            return torch.zeros((), device=self.chunks.device)
        left, of_all = torch.stack(self.left).unbind(1)
        return (left / of_all).nan_to_num(0.0).max().sqrt()

    def _chosen(self, problem: Problem, stats: Tensor, coefficients: Tensor) -> dict[float, Chosen]:
        """By tolerance, where a product of single entries is worth it; the one wait."""
        sizes = stats.new_empty(2, problem.rows)
        entries.launch_measure(problem, stats, coefficients, sizes)
        square, live = sizes.sum(1)
        mean = MARGIN * square / live
        made = {t: _select(problem, stats, coefficients, mean * t**2) for t in set(self.tolerances) if t > 0}
        lengths = torch.stack([lists.counts for lists in made.values()])
        fits = lengths <= entries.CAPACITY
        totals = torch.stack([torch.where(fits, lengths, 0).sum(1), (~fits).sum(1)], 1).tolist()
        chosen = {}
        for (tolerance, lists), fit, (count, overflows) in zip(made.items(), fits, totals, strict=True):
            if count * _DENSE <= problem.rows * problem.vocabulary and overflows * _OVERFLOWS <= problem.rows:
                others = torch.argsort(fit.to(torch.uint8), stable=True)[:overflows]
                chosen[tolerance] = Chosen(lists, count, others)
        return chosen

    def _hidden_gradient(self, chosen: Chosen) -> Tensor:
        """float32 [n, D]."""
        weight = self.chunks.head.weight
        out = torch.empty(len(chosen.lists.counts), weight.shape[1], device=weight.device)
        entries.launch_gather(*chosen.lists[:3], weight, out)
        return out.addmm_(chosen.lists.sums[2, :, None], self._mean_row())

    def _mean_row(self) -> Tensor:
        """float32 [1, D]: of the head, in whose place the rows of left out entries are taken."""
        if self.mean_row is None:
            self.mean_row = self.chunks.head.weight.mean(0, keepdim=True, dtype=torch.float32)
        return self.mean_row

    def _keep(self, chosen: Chosen, tokens: Tensor) -> None:
        """A chunk's entries wait for those of the others, up to a limit: the head's gradient is then made at once."""
        lists, count, _ = chosen
        if count == 0:
            return
        lengths = torch.where(lists.counts <= entries.CAPACITY, lists.counts, 0).to(torch.int64)
        at = torch.arange(count, device=lengths.device)
        row = torch.repeat_interleave(lengths, output_size=count)
        slot = at - (lengths.cumsum(0) - lengths)[row]
        self.few.append(Entries(tokens[row], lists.columns[row, slot], lists.values[row, slot]))
        self.kept += count
        if self.kept > _KEPT:
            self._add_few(last=False)

    def _add_few(self, last: bool) -> None:
        """last: nothing comes behind it, so that a sum that has nothing in it needs no float32."""
        if not self.few:
            return
        columns, tokens, values = Entries.joined(self.few).by_column()
        self.few, self.kept = [], 0
        ends = torch.searchsorted(columns, columns, right=True)
        hidden, weight, _ = self.chunks.head
        for total, matrix in self.chunks.head_sums(hidden if hidden.stride(1) == 1 else hidden.contiguous()):
            if last and total is self.chunks.d_weight and not total.begun:
                total.put(torch.zeros(weight.shape, dtype=storage_dtype(weight.dtype), device=weight.device))
            entries.launch_scatter(columns, ends, tokens, values, matrix, total.value)

    def _overflow(
        self, chosen: Chosen, problem: Problem, stats: Tensor, coefficients: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """The rows without a list, if any, and their gradient [k, V] in the products' dtype."""
        at = chosen.others
        if len(at) == 0:
            return []
        logits = _rows_of(problem.logits, at)
        ref = logits if problem.ref is problem.logits else _rows_of(problem.ref, at)
        tokens = problem.tokens._replace(rows_ptr=problem.tokens.rows_ptr[at])
        work = problem.work._replace(narrowed=False)
        some = replace(problem, logits=logits, ref=ref, tokens=tokens, work=work)
        # in place, and so by one program a row
        rows.launch_gradient(some, stats, coefficients, logits, stats, 1)
        return [(at, logits.to(self.chunks.grads_dtype))]


def _rows_of(matrix: Tensor, at: Tensor) -> Tensor:
    """Some rows of a matrix, as far apart as those of the whole."""
    room = memory.room(len(at), matrix.shape[1], matrix.dtype, matrix.device)
    return room.copy_(matrix.index_select(0, at))


def _select(problem: Problem, stats: Tensor, coefficients: Tensor, budget: Tensor) -> Lists:
    usable = (budget >= smallest_usable(problem.vocabulary, budget.dtype)) & budget.isfinite()
    budget = torch.where(usable, budget, -1.0)
    shape = problem.rows, entries.CAPACITY
    columns = torch.empty(shape, dtype=torch.int32, device=stats.device)
    lists = Lists(
        columns,
        stats.new_empty(shape),
        columns.new_empty(problem.rows),
        stats.new_empty(3, problem.rows),
    )
    entries.launch_select(problem, stats, coefficients, budget, *lists)
    return lists
