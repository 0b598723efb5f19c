"""What a caller's objective does, found out by trying it on made-up tokens: errors, and which way is open to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.maths.derivatives import ratio_of, recording
from prefixloss.maths.objectives import View

# responses and tokens of each
_RESPONSES, _LENGTH = 32, 4


class Traits(NamedTuple):
    """by_response, by_batch: it uses `given.response`, `given.batch`. silent: where A is 0 (for all tokens of a
    response, with by_response) the loss and its derivatives are 0; never with by_batch."""

    by_response: bool
    by_batch: bool
    silent: bool


class _Watched:
    """Responses of `_LENGTH` tokens, all scored, that remember whether they were asked."""

    def __init__(self) -> None:
        self.asked = False

    def _spread(self, x: Tensor, by: str) -> Tensor:
        self.asked = True
        return getattr(x.reshape(-1, _LENGTH), by)(1, keepdim=True).expand(-1, _LENGTH).reshape(-1)

    def sum(self, x: Tensor) -> Tensor:
        return self._spread(x, "sum")

    def mean(self, x: Tensor) -> Tensor:
        return self._spread(x, "mean")

    def max(self, x: Tensor) -> Tensor:
        return self._spread(x, "amax")


class _WatchedBatch:
    """All those tokens, likewise."""

    def __init__(self) -> None:
        self.asked = False

    @property
    def count(self) -> Tensor:
        self.asked = True
        return torch.tensor(_RESPONSES * _LENGTH)

    def mean(self, x: Tensor) -> Tensor:
        self.asked = True
        return x.detach().mean()

    def descending(self, x: Tensor) -> Tensor:
        self.asked = True
        return x.detach().sort(descending=True).values


def called(function: Callable[..., Any], logp: Tensor, given: View) -> Tensor:
    """The function's losses [n], or the error for what it must not do: another shape or dtype, changes in place."""
    # neither a compiler's tensors nor those of inference mode count their changes
    compiling = torch.compiler.is_compiling()
    seen = [] if compiling else [x for x in (logp, *vars(given).values()) if isinstance(x, Tensor)]
    counted = [(x, x._version) for x in seen if not x.is_inference()]
    loss = function(logp, given)
    if not isinstance(loss, Tensor) or loss.shape != logp.shape or not loss.is_floating_point():
        wants = f"a float tensor of shape {list(logp.shape)}, a loss a token"
        check.fail("objective", f"a result that is {check.describe(loss)}", wants)
    if any(x._version != version for x, version in counted):
        check.fail("objective", "a function that changes what it is given in place", "one that leaves it as it is")
    made: Tensor = loss
    return made


def tried(function: Callable[..., Any], like: Tensor, recorded: tuple[bool, ...], entropy: bool, kl: bool) -> Traits:
    """like: a tensor of the device and dtype of the call. recorded: whether old, sampler and reference log-probs are
    there. entropy, kl: whether the function gets them."""
    gen = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> Tensor:
        x = torch.randn(_RESPONSES * _LENGTH, generator=gen, dtype=torch.float64) * scale
        return x.to(like)

    logp = -drawn(3.0).abs()
    others = [logp - drawn(scale) if there else None for scale, there in zip((4.0, 1.0, 2.0), recorded, strict=True)]
    advantages, extra = drawn(1.0), [drawn(2.0).abs() if there else None for there in (entropy, kl)]
    asked, asked_batch, found = False, False, []
    for a in (advantages, torch.zeros_like(advantages)):
        watched, batch = _Watched(), _WatchedBatch()
        with torch.inference_mode(False), recording():
            leaves = [None if x is None else x.clone().requires_grad_() for x in (logp, *extra)]
            follow = [None if x is None else x.clone() for x in leaves]
            x = follow[0]
            assert x is not None
            old = others[0]
            ratio = ratio_of(x, torch.ones_like(x) if old is None else torch.exp(x - old))
            view = View(a, old, others[1], others[2], ratio, follow[1], follow[2], watched, batch)
            loss = called(function, x, view)
            if not loss.requires_grad:
                check.fail("objective", "a result that does not depend on logp", "one that is differentiable in it")
            wanted = [x for x in leaves if x is not None]
            slopes = torch.autograd.grad(loss.sum(), wanted, materialize_grads=True)
        asked, asked_batch = asked | watched.asked, asked_batch | batch.asked
        if bool(loss.isfinite().all()) and not all(bool(x.isfinite().all()) for x in slopes):
            check.fail("objective", "a derivative that is not finite where the loss is", "a finite one")
        found.append(all(not bool((x != 0).any()) for x in (loss, *slopes)))
    return Traits(asked, asked_batch, found[1] and not asked_batch)
