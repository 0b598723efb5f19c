"""Methods that start from logits: ours, copies, PyTorch, TRL's and Liger's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefixloss import prefix_loss

from .inputs import Logits, token_logps
from .step import Result, Step


def ours_from_logits(data: Logits, backend: str = "auto", inplace: bool = False) -> Step:
    def forward() -> Result:
        out = prefix_loss(
            data.leaf, data.tokens, data.advantages, old_logps=data.old, ref_logps=data.ref, inplace=inplace,
            backend=backend, config=data.config,
        )  # fmt: skip
        return Result(out.loss, out.logps)

    return Step(forward, (data.leaf,), renew=data.renew)


def ours_inplace(data: Logits) -> Step:
    return ours_from_logits(data, inplace=True)


def copy_logits(data: Logits) -> Step:
    """The floor: each logit is read once and its gradient written once."""
    target = torch.empty_like(data.given)

    def forward() -> Result:
        target.copy_(data.given)
        return Result()

    return Step(forward, (), lambda _: None)


def copy_logits_anew(data: Logits) -> Step:
    """The floor of a gradient in memory of its own: most of a large one's time goes into its first touch."""
    kept: list[Tensor] = []

    def forward() -> Result:
        kept.append(data.given.clone())
        return Result()

    return Step(forward, (), lambda _: None, renew=kept.clear)


def around_logits(data: Logits, logps_of: Callable[[], Tensor]) -> Step:
    def forward() -> Result:
        logps = logps_of()
        return Result(data.loss(logps), logps.detach())

    return Step(forward, (data.leaf,), renew=data.renew)


def naive_from_logits(data: Logits) -> Step:
    return around_logits(data, lambda: token_logps(data.leaf.float(), data.tokens))


def compiled_from_logits(data: Logits) -> Step:
    logps_of = torch.compile(lambda logits, tokens: token_logps(logits.float(), tokens), dynamic=False, fullgraph=True)
    return around_logits(data, lambda: logps_of(data.leaf, data.tokens))


def trl_from_logits(data: Logits) -> Step:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy  # noqa: PLC0415 (an optional peer)

    return around_logits(data, lambda: selective_log_softmax_and_entropy(data.leaf, data.tokens)[0])


def liger_from_logits(data: Logits, inplace: bool = False) -> Step:
    """Its logits are [B, T + 1, V], the last of which it leaves out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # noqa: PLC0415 (an optional peer)

    responses, length, vocabulary = data.given.shape
    leaf = data.given.new_zeros(responses, length + 1, vocabulary).requires_grad_()

    @torch.no_grad()
    def renew() -> None:
        leaf[:, :-1].copy_(data.given)

    def forward() -> Result:
        loss, _ = triton_grpo_loss(
            leaf, data.old, data.ref if data.kl_coef else None, data.tokens, data.advantages, temperature=1.0,
            beta=data.kl_coef, eps_low=0.2, eps_high=0.2, inplace=inplace, loss_type="dapo", reduce=True,
        )  # fmt: skip
        return Result(loss)

    return Step(forward, (leaf,), renew=renew)


def liger_inplace(data: Logits) -> Step:
    return liger_from_logits(data, inplace=True)
