"""The three products of an LM head, with float32 sums and float32 results whatever the inputs' dtype.

Half-precision inputs go to the vendor's library as they are where it offers a float32 result (`out_dtype`); elsewhere,
and where hidden states and head differ in dtype, the head is turned into float32 a slice of the vocabulary at a time.

Where somebody has put a product of their own in place of `aten::mm`, as the batch-invariant modes of vLLM and Megatron
do, theirs is called, and with float32 inputs: it returns what it is given, and logits rounded to half precision would
cost log-probs their digits. Half-precision numbers are exact even where such a product computes in TF32.
Letters: n rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from prefixloss.backends import memory

# elements of a head turned into float32 at a time, and of a product on its way into a sum: 64 MiB
_UPCAST = 2**24

_log = logging.getLogger("prefixloss")


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, V] = hidden [n, D] @ weight [V, D].T (+ bias [V])."""
    if _offered(hidden, weight):
        _mm(hidden, weight.t(), out)
    else:
        hidden = _float(hidden)
        for columns in _slices(*weight.shape):
            multiply(hidden, weight[columns].float().t(), out[:, columns])
    if bias is not None:
        out.add_(bias)


def hidden_gradient(grads: Tensor, weight: Tensor) -> Tensor:
    """grads [n, V] @ weight [V, D] -> float32 [n, D]."""
    out = memory.room(len(grads), weight.shape[1], torch.float32, grads.device)
    if _offered(grads, weight):
        _mm(grads, weight, out)
        return out
    for columns in _slices(*weight.shape):
        add_product(out, _float(grads[:, columns]), weight[columns].float(), first=columns.start == 0)
    return out


def add_head_gradient(total: Tensor, grads: Tensor, hidden: Tensor, first: bool = False) -> None:
    """total [V, D] += grads [n, V].T @ hidden [n, D]; total is float32. first: nothing is in it yet, so it is written
    and not read."""
    if not _offered(grads, hidden):
        hidden = hidden.float()
        for columns in _slices(*total.shape):
            add_product(total[columns], grads[:, columns].t().float(), hidden, first=first)
    elif first:
        _mm(grads.t(), hidden, total)
    else:
        _addmm(total, grads.t(), hidden)


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which logit gradients enter the products: half precision where they can use it."""
    return hidden.dtype if _offered(hidden, weight) else torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, all of one dtype."""
    if _replaced(a):
        out.copy_(torch.mm(a, b))  # nobody replaces the overload with `out`
    else:
        torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, first: bool = False) -> None:
    """total += alpha * a @ b, all of one dtype; `first` as above."""
    if _replaced(a):
        for rows in _slices(*total.shape):
            before = 0.0 if first else total[rows]
            total[rows] = torch.add(before, torch.mm(a[rows], b), alpha=alpha)
    else:
        total.addmm_(a, b, beta=0.0 if first else 1.0, alpha=alpha)


def _offered(a: Tensor, b: Tensor) -> bool:
    """Whether a and b can be multiplied as they are, all at once, into float32."""
    if a.dtype != b.dtype or _replaced(a):
        return False
    return a.dtype == torch.float32 or _has_float32_result(a.device, a.dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif _has_float32_sum(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for rows in _slices(*total.shape):
            part = total.new_empty(total[rows].shape)
            _mm(a[rows], b, part)
            total[rows].add_(part)


def _has_float32_result(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library multiplies this dtype into float32."""
    return device.type != "cpu" and _takes("mm", device, dtype, _tunes(device))


def _has_float32_sum(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it also adds such a product to a float32 sum, which torch 2.8 and 2.9 do not."""
    return device.type != "cpu" and _takes("addmm", device, dtype, _tunes(device))


_SLOW = {
    "mm": "heads are multiplied in float32, which takes several times as long",
    "addmm": "the head's gradient is multiplied into scratch memory and then added, which takes a little longer",
}


@lru_cache
def _takes(product: str, device: torch.device, dtype: torch.dtype, tunes: bool) -> bool:
    """Whether torch.mm or torch.addmm takes `out_dtype` here: asked once, by trying each layout that is needed.

    tunes: what the answer depends on besides, see `_tunes`.
    """
    a, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        for left, right in ((a, a.t()), (a, a), (a.t(), a)):
            if product == "mm":
                torch.mm(left, right, out_dtype=torch.float32, out=out)
            else:
                torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise  # says nothing about the library
    except (RuntimeError, TypeError) as refusal:
        reason = str(refusal).splitlines()[0]
        _log.warning(
            "torch.%s of %s into float32 is refused on %s by torch %s (%s): %s",
            product, dtype, device, torch.__version__, reason, _SLOW[product],
        )  # fmt: skip
        return False
    return True


def _tunes(device: torch.device) -> bool:
    """Whether TunableOp is on, which has no half-precision product with a float32 result."""
    return device.type == "cuda" and torch.cuda.tunable.is_enabled()


def _replaced(x: Tensor) -> bool:
    """Whether `aten::mm` for this device is somebody's own (through `torch.library`); none is for float64."""
    if x.dtype == torch.float64 or f"aten/mm/{x.device.type.upper()}" not in torch.library._impls:
        return False
    _say_replaced(x.device.type)
    return True


@lru_cache
def _say_replaced(device: str) -> None:
    _log.warning("aten::mm is replaced on %s: it multiplies heads, a slice at a time and in float32", device)


def _float(x: Tensor) -> Tensor:
    """x in float32, its rows as far apart as those of the buffers it stands beside."""
    if x.dtype == torch.float32:
        return x
    rows, columns = x.shape
    return memory.room(rows, columns, torch.float32, x.device).copy_(x)


def _slices(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _UPCAST // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
