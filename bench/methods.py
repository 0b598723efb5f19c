"""What is timed: ours, bare products, a copy, naive PyTorch, TRL and Liger, on the same random data in bf16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixloss import linear_logps, linear_prefix_loss, prefix_loss, products

BF16 = torch.bfloat16
# a call: its loss, if it has one
Step = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Linear:
    """Hidden states [N, D] and a head [V, D], leaves; per token [N] ids, advantages, and log-probs at the sampler."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    advantages: Tensor
    old: Tensor
    responses: int

    @classmethod
    def random(cls, device: torch.device, shape: tuple[int, int, int], responses: int, seed: int = 0) -> Linear:
        """shape: N, D, V. One advantage a response, which is all that Liger takes."""
        tokens, width, vocabulary = shape
        generator = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(tokens, width, generator=generator, device=device, dtype=BF16)
        weight = torch.randn(vocabulary, width, generator=generator, device=device, dtype=BF16) / math.sqrt(width)
        ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        advantages = torch.randn(responses, generator=generator, device=device)
        old = recorded(lambda rows: hidden[rows] @ weight.T, ids, generator)
        by_token = advantages.repeat_interleave(tokens // responses)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), ids, by_token, old, responses)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    def by_response(self, x: Tensor) -> Tensor:
        return x.reshape(self.responses, -1, *x.shape[1:])


class Logits:
    """Logits [B, T, V], the leaf `leaf`, made anew from a copy before each call; ids and old log-probs [B, T]."""

    def __init__(self, device: torch.device, responses: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (responses, length)
        self.given = torch.randn(*shape, vocabulary, generator=generator, device=device, dtype=BF16)
        self.tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
        self.advantages = torch.randn(responses, generator=generator, device=device)
        rows = self.given.flatten(0, 1)
        self.old = recorded(lambda here: rows[here], self.tokens.flatten(), generator).view(shape)
        self.leaf = self.given.clone().requires_grad_()

    @torch.no_grad()
    def renew(self) -> None:
        """In place, a call overwrites the logits."""
        self.leaf.copy_(self.given)


@torch.no_grad()
def recorded(logits_of: Callable[[slice], Tensor], tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Log-probs of tokens [N] near the policy's own, so that a few ratios are clipped, as in training."""
    chunks = (slice(start, start + 1024) for start in range(0, len(tokens), 1024))
    own = [logits_of(here).float().log_softmax(-1).gather(1, tokens[here, None]).squeeze(1) for here in chunks]
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
    return torch.cat(own) + 0.1 * noise


# Methods from hidden states


def policy_loss(logps: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """What a trainer writes around log-probs."""
    ratio = torch.exp(logps - old)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def ours(data: Linear, backend: str, advantages: Tensor | None = None, **options: Any) -> Step:
    advantages = data.advantages if advantages is None else advantages

    def step() -> Tensor:
        out = linear_prefix_loss(
            data.hidden, data.weight, data.tokens, advantages, old_logps=data.old, backend=backend, **options
        )
        out.loss.backward()
        return out.loss.detach()

    return step


def bare_products(data: Linear, count: int = 3) -> Step:
    """The floor: the logits, then the gradients of hidden states and head, each one library call with bf16 results."""
    hidden, weight = data.hidden.detach(), data.weight.detach()

    def step() -> None:
        logits = hidden @ weight.T
        if count > 1:
            logits @ weight
        if count > 2:
            logits.T @ hidden

    return step


def chunked_products(data: Linear) -> Step:
    """Our own products and nothing else: in chunks, with float32 results."""
    from prefixloss.chunks import chunk_rows  # noqa: PLC0415 (needs triton)

    hidden, weight = data.hidden.detach(), data.weight.detach()
    rows, vocabulary = len(hidden), len(weight)
    size = chunk_rows(rows, rows, 4 * vocabulary, hidden.device, None)
    logits = torch.empty(size, vocabulary, device=hidden.device)
    grads = torch.randn(size, vocabulary, device=hidden.device, dtype=BF16)

    def step() -> None:
        total = torch.zeros(weight.shape, device=hidden.device)
        for start in range(0, rows, size):
            here = hidden[start : start + size]
            products.logits(here, weight, None, logits[: len(here)])
            products.hidden_gradient(grads[: len(here)], weight)
            products.add_head_gradient(total, grads[: len(here)], here)

    return step


def trl_logps(data: Linear, weight: Tensor | None = None) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415 (an optional peer)

    head = data.weight if weight is None else weight
    # TRL's own tile, 32,768 columns wide
    return lambda: ChunkedLogProbFunction.apply(data.hidden, head, None, data.tokens, 1.0, 32768, None, 1.0, ())[0]


def trl(data: Linear) -> Step:
    logps = trl_logps(data)

    def step() -> Tensor:
        loss = policy_loss(logps(), data.old, data.advantages)
        loss.backward()
        return loss.detach()

    return step


def liger(data: Linear) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415 (an optional peer)

    # what it compiles is the arithmetic on log-probs alone, a small part
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    tokens, old, advantages = (data.by_response(x) for x in (data.tokens, data.old, data.advantages))
    mask, advantages = torch.ones_like(old), advantages[:, 0].contiguous()

    def step() -> Tensor:
        out = loss(data.by_response(data.hidden), data.weight, tokens, mask, advantages, old_per_token_logps=old)
        total: Tensor = out[0] if isinstance(out, tuple) else out
        total.backward()
        return total.detach()

    return step


def our_logps(data: Linear, backend: str, weight: Tensor | None = None) -> Callable[[], Tensor]:
    head = data.weight if weight is None else weight
    return lambda: linear_logps(data.hidden, head, data.tokens, backend=backend).logps


def with_gradient(logps: Callable[[], Tensor], gradient: Tensor) -> Step:
    def step() -> None:
        logps().backward(gradient)

    return step


def without_gradient(logps: Callable[[], Tensor]) -> Step:
    def step() -> None:
        with torch.no_grad():
            logps()

    return step


# Methods from logits


def ours_from_logits(data: Logits, backend: str, inplace: bool) -> Step:
    def step() -> Tensor:
        out = prefix_loss(data.leaf, data.tokens, data.advantages, old_logps=data.old, inplace=inplace, backend=backend)
        out.loss.backward()
        return out.loss.detach()

    return step


def copy_logits(data: Logits) -> Step:
    """The floor: each logit is read once and its gradient written once."""
    target = torch.empty_like(data.given)

    def step() -> None:
        target.copy_(data.given)

    return step


def naive_from_logits(data: Logits) -> Step:
    def step() -> Tensor:
        logps = data.leaf.float().log_softmax(-1).gather(-1, data.tokens[..., None]).squeeze(-1)
        loss = policy_loss(logps, data.old, data.advantages[:, None])
        loss.backward()
        return loss.detach()

    return step


def liger_from_logits(data: Logits, leaf: Tensor, inplace: bool) -> Step:
    """leaf: logits [B, T + 1, V], the last of which Liger leaves out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # noqa: PLC0415 (an optional peer)

    def step() -> Tensor:
        loss, _ = triton_grpo_loss(
            leaf, data.old, None, data.tokens, data.advantages, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2,
            inplace=inplace, loss_type="dapo", reduce=True,
        )  # fmt: skip
        loss.backward()
        return loss.detach()

    return step
