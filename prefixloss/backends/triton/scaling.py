"""Gradients that were made with the loss, times the loss's own gradient once that comes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss._kernels.scale import launch_scale
from prefixloss.backends.autograd import first_order, graph_is_kept

# elements of half precision turned into float32 at a time: 16 MiB
_UPCAST = 2**22


@torch.library.custom_op("prefixloss::scale_", mutates_args={"x"})
def scale_(x: Tensor, factor: Tensor) -> None:
    """x times the float32 0-d factor, in place; untouched where it is 1."""
    if x.is_contiguous():
        launch_scale(x, factor)
    elif x.dtype == torch.float32:
        x.mul_(factor)
    else:
        # torch would round the factor to x's dtype first
        for matrix in x if x.dim() > 2 else (x,):
            for rows_ in matrix.split(max(1, _UPCAST // x.shape[-1])):
                rows_.copy_(rows_.float().mul_(factor))


@scale_.register_fake
def _(x: Any, factor: Any) -> None:
    return None


def times(saved: Tensor, factor: Tensor) -> Tensor:
    """saved times the float32 0-d factor: the memory of `saved` where nobody can ask for it again, else a copy."""
    if type(saved) is not Tensor:  # a compiler's, which decides itself what may be overwritten
        return (saved.float() * factor).to(saved.dtype)
    scaled = saved.clone() if graph_is_kept() else saved
    scale_(scaled, factor)
    return scaled


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For an operator that returns the loss, stats, terms, the gradients of its first inputs, at most three, and what
    else there is behind them."""
    gradients = output[3:6]
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs[: len(gradients)]]
    ctx.others = len(inputs) - len(gradients)
    ctx.mark_non_differentiable(*output[1:])


@first_order
def scaled_gradients(ctx: Any, factor: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward times the loss's own."""
    factor = factor.float()
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    out = [times(saved, factor).to(dtype) if needed else None for saved, dtype, needed in made]
    return *out, *(None,) * ctx.others
