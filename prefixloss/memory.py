"""How much memory the loss may use beyond its inputs and gradients.

`PREFIXLOSS_MEMORY` (bytes) sets the budget for the logits of one chunk of tokens; unset, it is 64 MiB on a CPU, where
larger chunks gain nothing, and 1 GiB elsewhere.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def budget(device: torch.device) -> int:
    """The budget in bytes."""
    text = os.environ.get("PREFIXLOSS_MEMORY")
    if text is None:
        return 2**26 if device.type == "cpu" else 2**30
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"PREFIXLOSS_MEMORY: got {text!r}, expected a whole number of bytes > 0")
    return int(text)


def chunk_rows(rows: int, bytes_per_row: int, device: torch.device, chosen: int | None = None) -> int:
    """Rows a chunk: `chosen`, or as many as the budget allows, evened out so that no chunk is a small remainder."""
    most = chosen or max(1, budget(device) // bytes_per_row)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU from NumPy, which asks Linux for huge pages: a large buffer's first use is 4 x faster."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(tuple(shape), dtype=f"i{dtype.itemsize}")
    return torch.from_numpy(raw).view(dtype)
