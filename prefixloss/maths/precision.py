"""In which dtype sums are made, and gradients wait."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait for the incoming scale in float32, or a small one would underflow before a loss scale."""
    return torch.float32 if dtype == torch.float16 else dtype
