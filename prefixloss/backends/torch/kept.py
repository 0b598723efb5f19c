"""Logits of the kept columns alone: K D multiply-adds a token in place of V D, then a loss from logits [N, K].

A column that is not used has the logit -inf, so that all that is computed is of the distribution over the kept ids.
Where the sets are so large that looking up each token's own columns costs more than it saves, whole products are made,
of all columns that any token keeps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss.backends import memory
from prefixloss.backends.autograd import first_order
from prefixloss.backends.problem import Head
from prefixloss.backends.sparse import Entries, add_transposed, dots, product, transposed_product
from prefixloss.backends.torch.rows import LinearRows
from prefixloss.inputs.kept import Kept
from prefixloss.maths.precision import accumulation_dtype
from prefixloss.maths.softmax import Transform

# multiply-adds of a dense product in the time of one whose column is looked up; measured on two cores
_LOOKED_UP = 15
# bytes of an entry, with its place in the order of the columns
_ENTRY = 64

_AS_IS = Transform(1.0, None, 1.0)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def of_head(head: Head, kept: Kept, scored: Tensor, plain: bool) -> Tensor:
    """[N, K], in the accumulation dtype; 0 for tokens that are not scored, NaN where a token is not in its set. plain:
    by autograd alone, for derivatives of derivatives."""
    rows = scored.nonzero().squeeze(1)
    if plain:
        made = _plain(head, kept.ids.clamp(min=0), rows)
    else:
        made = _Products.apply(*head, kept.ids, rows, _union(kept.ids, len(head.weight)))
    return _only_kept(made, kept, scored)


def of_logits(logits: Tensor, kept: Kept, scored: Tensor) -> Tensor:
    """[N, V] -> [N, K]."""
    return _only_kept(logits.gather(1, kept.ids.clamp(min=0)), kept, scored)


def _only_kept(logits: Tensor, kept: Kept, scored: Tensor) -> Tensor:
    logits = torch.where(kept.ids >= 0, logits, -math.inf)
    logits = torch.where((scored & ~kept.known)[:, None], math.nan, logits)
    return torch.where(scored[:, None], logits, 0.0)


def _plain(head: Head, ids: Tensor, rows: Tensor) -> Tensor:
    dtype, chosen = accumulation_dtype(head.hidden, head.weight), ids[rows]
    made = torch.bmm(head.weight[chosen].to(dtype), head.hidden[rows].to(dtype)[:, :, None]).squeeze(2)
    made = made if head.bias is None else made + head.bias.to(dtype)[chosen]
    return made.new_zeros(ids.shape).index_copy(0, rows, made)


class _Products(torch.autograd.Function):
    """The logits [N, K] of the tokens `rows`, by whole products where there is a union of their sets."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor, union: _Union | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids, rows)
        ctx.union, head = union, Head(hidden, weight, bias)
        out = torch.zeros(ids.shape, dtype=accumulation_dtype(hidden, weight), device=hidden.device)
        if union is None:
            _look_up(head, ids, rows, out)
        else:
            _multiply(head, ids, rows, out, union)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, ids, rows = ctx.saved_tensors
        head, live = Head(hidden, weight, bias), rows[(grad[rows] != 0).any(1)]
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        if ctx.union is None:
            made = _looked_up_gradients(head, ids, live, grad, needs)
        else:
            made = _multiplied_gradients(head, ids, live, grad, needs, ctx.union)
        pairs = zip(made, (hidden, weight, bias), strict=True)
        return (*(None if g is None else g.to(x.dtype) for g, x in pairs), None, None, None)


# --- each token's own columns


def _look_up(head: Head, ids: Tensor, rows: Tensor, out: Tensor) -> None:
    for part in _pieces(rows, head, ids, out.dtype):
        row, place = (ids[part] >= 0).nonzero().unbind(1)
        column = ids[part[row], place]
        made = dots(row, column, head.hidden[part], head.weight, out.dtype)
        out[part[row], place] = made if head.bias is None else made + head.bias.to(out.dtype)[column]


def _looked_up_gradients(head: Head, ids: Tensor, live: Tensor, grad: Tensor, needs: tuple[bool, ...]) -> Gradients:
    hidden, weight, _ = head
    d_hidden = torch.zeros_like(hidden) if needs[0] else None
    d_weight = d_bias = None
    for part in _pieces(live, head, ids, grad.dtype):
        row, place = (grad[part] != 0).nonzero().unbind(1)
        entries = Entries(row, ids[part[row], place], grad[part[row], place])
        if d_hidden is not None:
            d_hidden[part] = product(entries, len(part), weight, grad.dtype).to(d_hidden.dtype)
        if needs[1]:
            d_weight = _added(d_weight, entries, len(weight), hidden[part].to(grad.dtype))
        if needs[2]:
            d_bias = _added(d_bias, entries, len(weight), grad.new_ones(len(part), 1))
    return d_hidden, d_weight, None if d_bias is None else d_bias.squeeze(1)


def _added(total: Tensor | None, entries: Entries, columns: int, matrix: Tensor) -> Tensor:
    """total [V, D], or 0, plus the transpose of the matrix [n, V] of these entries times matrix [n, D]."""
    if total is None:  # most often all there is: no zeros are written, and read again
        return transposed_product(entries, columns, matrix)
    add_transposed(total, entries, matrix)
    return total


def _pieces(rows: Tensor, head: Head, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The rows in pieces whose entries and hidden states fit into the memory budget; one at least."""
    per_row = ids.shape[1] * _ENTRY + head.hidden.shape[1] * dtype.itemsize
    return rows.split(memory.rows_in_budget(len(rows), per_row, rows.device))


# --- products with all columns that are kept by any token


class _Union(NamedTuple):
    """The columns that are multiplied, int64 [U] (None: all), and where among them each id stands, int64 [V]."""

    columns: Tensor | None
    place: Tensor

    def of(self, head: Head) -> Head:
        if self.columns is None:
            return head
        return Head(head.hidden, head.weight[self.columns], None if head.bias is None else head.bias[self.columns])

    def places(self, ids: Tensor) -> Tensor:
        """Of ids [n, K]; that of some column for those that are not used."""
        return self.place[ids.clamp(min=0)]

    def spread(self, x: Tensor | None) -> Tensor | None:
        """x [U, ..] among the zeros of the other columns, [V, ..]."""
        if x is None or self.columns is None:
            return x
        return memory.zeros((len(self.place), *x.shape[1:]), x.dtype, x.device).index_copy_(0, self.columns, x)


def _union(ids: Tensor, vocabulary: int) -> _Union | None:
    """Of ids [N, K]; None where it is cheaper to look up each token's own columns."""
    used = ids >= 0
    # one more, for what is not used
    seen = used.new_zeros(vocabulary + 1).index_fill_(0, torch.where(used, ids, vocabulary).reshape(-1), True)[:-1]
    looked_up, tokens, columns = (int(x) for x in torch.stack([used.sum(), used.any(1).sum(), seen.sum()]))
    if looked_up * _LOOKED_UP < tokens * columns:
        return None
    if 2 * columns > vocabulary:  # a copy of most of the head costs more than it saves
        return _Union(None, torch.arange(vocabulary, device=ids.device))
    return _Union(seen.nonzero().squeeze(1), seen.cumsum(0) - 1)


def _multiply(head: Head, ids: Tensor, rows: Tensor, out: Tensor, union: _Union) -> None:
    policy = LinearRows(union.of(head), _AS_IS)
    for part in policy.chunks(rows, None):
        out[part] = policy.scores(part).gather(1, union.places(ids[part]))


def _multiplied_gradients(
    head: Head, ids: Tensor, live: Tensor, grad: Tensor, needs: tuple[bool, ...], union: _Union
) -> Gradients:
    policy = LinearRows(union.of(head), _AS_IS, needs)
    room = grad.new_zeros(0)
    for part in policy.chunks(live, None):
        if len(room) < len(part):
            room = memory.zeros((len(part), policy.vocabulary), grad.dtype, grad.device)
        there, columns = room[: len(part)], union.places(ids[part])
        # a place that is not used has the gradient 0, and may name a column that another one names
        there.scatter_add_(1, columns, grad[part])
        policy.add_gradient(part, there, 1.0)
        there.scatter_(1, columns, 0.0)
    d_hidden, d_weight, d_bias = policy.gradients()
    return d_hidden, union.spread(d_weight), union.spread(d_bias)
