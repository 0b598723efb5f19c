"""x times a factor that only the device knows, in place: a gradient made in the forward times the loss's own.

Nothing is read or written where the factor is 1, which it is in `loss.backward()`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device, options

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit  # specialised on sizes that 16 divides: only then are the masked accesses wide
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < tl.where(factor == 1.0, 0, size)
    x = tl.load(x_ptr + at, mask=wanted)
    tl.store(x_ptr + at, (x.to(tl.float32) * factor).to(x.dtype), mask=wanted)


@on_device
def launch_scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x: contiguous, any shape. factor: float32, 0-d."""
    scale_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, factor, x.numel(), _BLOCK, **options(_NUM_WARPS))
