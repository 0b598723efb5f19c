"""Logits of the kept columns alone: K D multiply-adds a token in place of V D, then a loss from logits [N, K].

A column that is not used has the logit -inf, so that all that is computed is of the distribution over the kept ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prefixloss.backends import memory
from prefixloss.backends.autograd import first_order
from prefixloss.backends.problem import Head
from prefixloss.backends.sparse import Entries, add_transposed, product
from prefixloss.inputs.kept import Kept
from prefixloss.maths.precision import accumulation_dtype


def of_head(head: Head, kept: Kept, scored: Tensor, plain: bool) -> Tensor:
    """[N, K], in the accumulation dtype; 0 for tokens that are not scored, NaN where a token is not in its set. plain:
    by autograd alone, for derivatives of derivatives."""
    rows = scored.nonzero().squeeze(1)
    make = _products if plain else _Products.apply
    made = make(head.hidden, head.weight, head.bias, kept.ids.clamp(min=0), rows)
    return _only_kept(made, kept, scored)


def of_logits(logits: Tensor, kept: Kept, scored: Tensor) -> Tensor:
    """[N, V] -> [N, K]."""
    return _only_kept(logits.gather(1, kept.ids.clamp(min=0)), kept, scored)


def _only_kept(logits: Tensor, kept: Kept, scored: Tensor) -> Tensor:
    logits = torch.where(kept.ids >= 0, logits, -math.inf)
    logits = torch.where((scored & ~kept.known)[:, None], math.nan, logits)
    return torch.where(scored[:, None], logits, 0.0)


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
    made = _chunk(hidden, weight, bias, ids, rows)
    return made.new_zeros(ids.shape).index_copy(0, rows, made)


class _Products(torch.autograd.Function):
    """`_products`, some tokens at a time, with the heads' rows gathered again in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids, rows)
        out = torch.zeros(ids.shape, dtype=accumulation_dtype(hidden, weight), device=hidden.device)
        for part in _pieces(rows, ids.shape[1] * hidden.shape[1] * out.dtype.itemsize):
            out[part] = _chunk(hidden, weight, bias, ids, part)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, ids, rows = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, grad.dtype
        d_hidden = torch.zeros_like(hidden) if needs[0] else None
        d_weight = memory.zeros(weight.shape, dtype, weight.device) if needs[1] else None
        d_bias = memory.zeros((len(weight), 1), dtype, weight.device) if bias is not None and needs[2] else None
        live = rows[(grad[rows] != 0).any(1)]
        for part in _pieces(live, hidden.shape[1] * dtype.itemsize):
            row, place = (grad[part] != 0).nonzero().unbind(1)
            entries = Entries(row, ids[part][row, place], grad[part][row, place])
            if d_hidden is not None:
                d_hidden[part] = product(entries, len(part), weight, dtype).to(d_hidden.dtype)
            if d_weight is not None:
                add_transposed(d_weight, entries, hidden[part].to(dtype))
            if d_bias is not None:
                add_transposed(d_bias, entries, d_bias.new_ones(len(part), 1))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.squeeze(1).to(bias.dtype), None, None


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
    """[n, K] of the tokens `rows` [n]."""
    chosen, dtype = ids[rows], accumulation_dtype(hidden, weight)
    made = torch.bmm(weight[chosen].to(dtype), hidden[rows].to(dtype)[:, :, None]).squeeze(2)
    return made if bias is None else made + bias.to(dtype)[chosen]


def _pieces(rows: Tensor, bytes_per_row: int) -> tuple[Tensor, ...]:
    """The rows in pieces that fit into the memory budget."""
    return rows.split(memory.rows_in_budget(len(rows), max(1, bytes_per_row), rows.device)) if len(rows) else ()
