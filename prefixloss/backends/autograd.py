"""What the back-ends' own backward functions ask of autograd: may this one come again, and is a graph of it wanted?"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# private, but what torch's own compiled backward asks, for the same reason
_KEPT = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def wants_gradient(x: Tensor | None) -> bool:
    return torch.is_grad_enabled() and x is not None and x.requires_grad


def graph_is_kept() -> bool:
    """Whether the backward that is running may come again (retain_graph=True).

    Only where it may not is a saved tensor free to be overwritten, or to become somebody's `.grad`.
    """
    return True if _KEPT is None else bool(_KEPT())


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that no second derivative, and no vmap, goes through.

    `once_differentiable` says so only where the incoming gradient has a graph itself. That of a plain loss has none: a
    gradient penalty would be left out without a word.
    """

    @wraps(backward)
    def checked(ctx: Any, *incoming: Any) -> Any:
        if torch.compiler.is_compiling():  # traced in any grad mode
            return backward(ctx, *incoming)
        asked = expected = None
        if torch.is_grad_enabled():
            asked, expected = "create_graph", "first derivatives only"
        elif any(isinstance(x, Tensor) and _batched(x) for x in incoming):
            asked, expected = "is_grads_batched", "one gradient at a time"
        if asked is not None:
            wants = f'{expected} with the back-ends "torch" and "triton" (backend="reference" takes it)'
            raise RuntimeError(f"{asked}: got True, expected {wants}")
        return backward(ctx, *incoming)

    return checked


def _batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)
