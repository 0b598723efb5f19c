"""Methods that start from hidden states: ours, the floor, PyTorch and its fused head, TRL, Liger, Cut Cross-Entropy.

Every wrapper of a peer's head is here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixloss import linear_logps, linear_prefix_loss
from prefixloss.backends import memory, products

from .inputs import Linear, capped, padding, policy_terms, token_logps
from .step import Result, Step

IGNORED = -100
TRL_TILE = 32_768  # columns at a time, TRL's own choice
# tokens at a time for those that ask: more than Liger's own single response or PyTorch's own 4 rows (D 128, V 32,768),
# with which they take several times as long
AT_ONCE = 1024


def ours(data: Linear, backend: str = "auto", advantages: Tensor | None = None, **options: Any) -> Step:
    given = data.advantages if advantages is None else advantages
    options = {"config": data.config, **options}

    def forward() -> Result:
        out = linear_prefix_loss(
            data.hidden, data.weight, data.tokens, given, old_logps=data.old, ref_logps=data.ref, backend=backend,
            **options,
        )  # fmt: skip
        return Result(out.loss, out.logps)

    return Step(forward, data.leaves)


def bare_products(data: Linear, count: int = 3) -> Step:
    """The floor: the learning tokens' logits, then the gradients of hidden states and head, a library call each, into
    memory that is ready."""
    learning = data.learning
    hidden, weight = data.hidden.detach(), data.weight.detach()
    if not learning.all():
        hidden = hidden[learning]
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> Result:
        torch.mm(hidden, weight.T, out=logits)
        return Result()

    def backward(_: Result) -> None:
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
        if count > 2:
            torch.mm(logits.T, hidden, out=d_weight)

    return Step(forward, (), backward)


def chunked_products(data: Linear) -> Step:
    """Our own products and nothing else: in chunks, with float32 results."""
    hidden, weight = data.hidden.detach(), data.weight.detach()
    rows, vocabulary = len(hidden), len(weight)
    size = memory.chunk_rows(rows, rows, 4 * vocabulary, hidden.device, None)
    logits = torch.empty(size, vocabulary, device=hidden.device)
    grads = torch.randn(size, vocabulary, device=hidden.device, dtype=hidden.dtype)

    def forward() -> Result:
        total = torch.zeros(weight.shape, device=hidden.device)
        for start in range(0, rows, size):
            here = hidden[start : start + size]
            products.logits(here, weight, None, logits[: len(here)])
            products.hidden_gradient(grads[: len(here)], weight)
            products.add_head_gradient(total, grads[: len(here)], here)
        return Result()

    return Step(forward, (), lambda _: None)


def around(data: Linear, logps_of: Callable[[], Tensor]) -> Step:
    """The loss as a trainer writes it, around somebody's log-probs [N]."""

    def forward() -> Result:
        logps = logps_of()
        return Result(data.loss(logps), logps.detach())

    return Step(forward, data.leaves)


def naive(data: Linear) -> Step:
    return around(data, lambda: token_logps(capped((data.hidden @ data.weight.T).float(), data.softcap), data.tokens))


def picked(data: Linear) -> Step:
    """PyTorch by somebody who knows which tokens learn: only their rows are multiplied."""
    rows = data.learning.nonzero().squeeze(1)

    def forward() -> Result:
        logits = capped((data.hidden[rows] @ data.weight.T).float(), data.softcap)
        logps = token_logps(logits, data.tokens[rows])
        return Result(data.loss(logps, rows), torch.zeros_like(data.old).index_copy(0, rows, logps.detach()))

    return Step(forward, data.leaves)


def compiled(data: Linear) -> Step:
    softcap, kl_coef = data.softcap, data.kl_coef

    @torch.compile(dynamic=False, fullgraph=True)
    def loss_of(
        hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        logps = token_logps(capped((hidden @ weight.T).float(), softcap), tokens)
        return policy_terms(logps, old, ref, advantages, kl_coef).mean(), logps

    def forward() -> Result:
        loss, logps = loss_of(data.hidden, data.weight, data.tokens, data.old, data.ref, data.advantages)
        return Result(loss, logps.detach())

    return Step(forward, data.leaves)


def torch_fused(data: Linear) -> Step:
    """PyTorch's own chunked head, with a log-prob a token."""
    from torch.nn import LinearCrossEntropyOptions  # noqa: PLC0415 (since 2.13)
    from torch.nn.functional import linear_cross_entropy  # noqa: PLC0415 (since 2.13)

    targets = torch.where(data.learning, data.tokens, IGNORED)
    options = LinearCrossEntropyOptions(batch_chunk_size=min(AT_ONCE, len(targets)))
    return around(
        data, lambda: -linear_cross_entropy(data.hidden, data.weight, targets, reduction="none", options=options)
    )


def trl_logps(data: Linear, weight: Tensor | None = None) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415 (an optional peer)

    head = data.weight if weight is None else weight
    return lambda: ChunkedLogProbFunction.apply(
        data.hidden, head, None, data.tokens, 1.0, TRL_TILE, data.softcap, 1.0, ()
    )[0]


def trl(data: Linear) -> Step:
    return around(data, trl_logps(data))


def cut_cross_entropy(data: Linear) -> Step:
    """Log-probs by its kernels on a GPU, by its torch.compile way elsewhere; it leaves out ignored tokens."""
    from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 (an optional peer)

    targets = torch.where(data.learning, data.tokens, IGNORED)
    way = "cce" if data.hidden.is_cuda else "torch_compile"
    return around(
        data,
        lambda: (
            -linear_cross_entropy(
                data.hidden, data.weight, targets, softcap=data.softcap, reduction="none", impl=way
            ).float()
        ),
    )


def liger(data: Linear, compiled: bool = True) -> Step:
    """Padded, as it wants its input; responses are put together up to `AT_ONCE` tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415 (an optional peer)

    assert data.response_advantages is not None
    index, mask = padding(data.lengths, data.hidden.device)
    tokens, old, ref = (x[index] for x in (data.tokens, data.old, data.ref))
    hidden = data.hidden.detach()[index].requires_grad_()
    loss = LigerFusedLinearGRPOLoss(
        beta=data.kl_coef, compiled=compiled, use_ref_model=bool(data.kl_coef),
        chunk_size=max(1, AT_ONCE // index.shape[1]),
    )  # fmt: skip

    def forward() -> Result:
        out = loss(
            hidden, data.weight, tokens, mask.float(), data.response_advantages, old_per_token_logps=old,
            ref_per_token_logps=ref if data.kl_coef else None,
        )  # fmt: skip
        return Result(out[0] if isinstance(out, tuple) else out)

    return Step(forward, (hidden, data.weight))


def our_logps(data: Linear, backend: str, weight: Tensor | None = None) -> Callable[[], Tensor]:
    head = data.weight if weight is None else weight
    return lambda: linear_logps(data.hidden, head, data.tokens, backend=backend).logps


def with_gradient(logps: Callable[[], Tensor], gradient: Tensor, leaves: tuple[Tensor, ...]) -> Step:
    return Step(lambda: Result(logps=logps()), leaves, lambda result: _given(result.logps).backward(gradient))


def _given(logps: Tensor | None) -> Tensor:
    assert logps is not None
    return logps


def without_gradient(logps: Callable[[], Tensor]) -> Step:
    def forward() -> Result:
        with torch.no_grad():
            return Result(logps=logps())

    return Step(forward, (), lambda _: None)
