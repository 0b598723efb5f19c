"""x times a factor that only the device knows, in place: a gradient made in the forward times the loss's own.

Nothing is read or written where the factor is 1, which it is in `loss.backward()`. The host cannot know: autograd makes
that 1 on the device, and looking at it would wait. So the launch is made cheap: as many programs as the device holds at
once, however long x is, and each of them ends when it has seen the 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device, options, processors

_BLOCK = 4096
_NUM_WARPS = 8
# that a multiprocessor holds: 2,048 threads
_PROGRAMS = 8


@triton.jit  # specialised on sizes that 16 divides: only then are the masked accesses wide
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    blocks = tl.where(factor == 1.0, 0, tl.cdiv(size - start, step)).to(tl.int32)
    at = start + tl.arange(0, BLOCK)
    for _ in range(0, blocks):
        x = tl.load(x_ptr + at, mask=at < size)
        tl.store(x_ptr + at, (x.to(tl.float32) * factor).to(x.dtype), mask=at < size)
        at += step


@on_device
def launch_scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x: contiguous, any shape. factor: float32, 0-d."""
    programs = min(triton.cdiv(x.numel(), _BLOCK), _PROGRAMS * processors(x.device))
    scale_kernel[(programs,)](x, factor, x.numel(), _BLOCK, **options(_NUM_WARPS))
