"""The three products of an LM head, with float32 sums and float32 results whatever the inputs' dtype.

Half-precision inputs go to the vendor's library as they are where it offers a float32 result (`out_dtype`); elsewhere,
and where hidden states and head differ in dtype, the head is turned into float32 a slice of the vocabulary at a time.
Letters: n rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# elements of a head turned into float32 at a time: 64 MiB
_UPCAST = 2**24


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, V] = hidden [n, D] @ weight [V, D].T (+ bias [V])."""
    if _offered(hidden, weight):
        if bias is None:
            _mm(hidden, weight.t(), out)
        else:
            out.copy_(bias)
            _addmm(out, hidden, weight.t())
        return
    for columns in _slices(*weight.shape):
        torch.mm(hidden.float(), weight[columns].float().t(), out=out[:, columns])
    if bias is not None:
        out.add_(bias)


def hidden_gradient(grads: Tensor, weight: Tensor) -> Tensor:
    """grads [n, V] @ weight [V, D] -> float32 [n, D]."""
    if _offered(grads, weight):
        out = grads.new_empty(len(grads), weight.shape[1], dtype=torch.float32)
        _mm(grads, weight, out)
        return out
    out = grads.new_zeros(len(grads), weight.shape[1], dtype=torch.float32)
    for columns in _slices(*weight.shape):
        out.addmm_(grads[:, columns].float(), weight[columns].float())
    return out


def add_head_gradient(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    """total [V, D] += grads [n, V].T @ hidden [n, D]; total is float32."""
    if _offered(grads, hidden):
        _addmm(total, grads.t(), hidden)
        return
    for columns in _slices(*total.shape):
        total[columns].addmm_(grads[:, columns].t().float(), hidden.float())


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which logit gradients enter the products: half precision where they can use it."""
    return hidden.dtype if _offered(hidden, weight) else torch.float32


def _offered(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (a.dtype == torch.float32 or _has_float32_result(a.device, a.dtype))


@lru_cache
def _has_float32_result(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library multiplies this dtype into float32; asked once, by trying."""
    if device.type == "cpu":
        return False
    try:
        a, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
        _mm(a, a, out)
        _addmm(out, a, a)
    except (RuntimeError, TypeError):
        return False
    return True


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _slices(vocabulary: int, width: int) -> Iterator[slice]:
    step = max(1, _UPCAST // max(1, width))
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))
