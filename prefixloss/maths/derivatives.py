"""Functions of a token's scalars whose derivative autograd alone would lose to an overflow or round away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# what an operator of `torch.library` keeps from its own code
_RECORDING = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


@contextmanager
def recording() -> Iterator[None]:
    """Inside it autograd records, also where the caller is an operator, which it would otherwise see as a whole."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in _RECORDING:
        left_out = left_out.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


class _Ratio(torch.autograd.Function):
    """d rho / d logp = rho, and where no gradient comes in none goes out: beyond a bound 0 times inf would be NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, ratio: Tensor) -> Tensor:
        return ratio.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return torch.where(grad == 0, 0.0, grad * ratio), None


class _Known(torch.autograd.Function):
    """value, whose derivative with respect to x is slope."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def ratio_of(logp: Tensor, ratio: Tensor) -> Tensor:
    """rho [n] that follows logp [n], whatever it was made of."""
    made: Tensor = _Ratio.apply(logp, ratio.detach())
    return made


def known(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """value, [n], a function of x [n] with derivative `slope`."""
    made: Tensor = _Known.apply(x, value.detach(), slope)
    return made


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), and sigmoid(x) sigmoid(-x) as its derivative, which keeps its digits on both sides.

    torch.sigmoid has other bits for the last few numbers of a tensor than for the rest; exp has not.
    """

    def plain(y: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-y))

    value = plain(x)
    return known(x, value, value * plain(-x))
