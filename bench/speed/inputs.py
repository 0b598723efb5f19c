"""Random data that every method takes, and the loss that all of them compute.

The loss is clipped at 0.2, perhaps with a k3 penalty, averaged over tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixloss import LossConfig

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Linear:
    """Hidden states [N, D] and a head [V, D], leaves; per token [N] ids, advantages, log-probs when sampled and of a
    reference. lengths, response_advantages: per response [B]; the latter None where a token has its own."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    lengths: Tensor
    response_advantages: Tensor | None
    kl_coef: float = 0.0
    softcap: float | None = None

    @classmethod
    def of(
        cls, weight: Tensor, lengths: Tensor, advantages: Tensor, response_advantages: Tensor | None = None, *,
        kl_coef: float = 0.0, softcap: float | None = None, seed: int = 0,
    ) -> Linear:  # fmt: skip
        """Tokens of which the policy is more or less sure, log-probs from about -7 to -1e-4, as those it sampled.

        Hidden states are noise and a multiple of the token's row of the head.
        """
        device, (vocabulary, width), count = weight.device, weight.shape, len(advantages)
        generator = torch.Generator(device).manual_seed(seed + 1)
        ids = torch.randint(vocabulary, (count,), generator=generator, device=device)
        hidden = torch.randn(count, width, generator=generator, device=device, dtype=weight.dtype)
        sure = 5 + 15 * torch.rand(count, 1, generator=generator, device=device)
        hidden += (sure * weight.detach()[ids].float()).to(weight.dtype)
        old = 0.1 * torch.randn(count, generator=generator, device=device) + expected_logps(hidden, weight, ids)
        ref = old + 0.1 * torch.randn(count, generator=generator, device=device)
        by_response = None if response_advantages is None else response_advantages.to(device)
        return cls(
            hidden.requires_grad_(), weight.requires_grad_(), ids, advantages.to(device), old, ref, lengths,
            by_response, kl_coef, softcap,
        )  # fmt: skip

    @classmethod
    def random(
        cls, device: torch.device, shape: tuple[int, int, int], responses: int, seed: int = 0, dtype: torch.dtype = BF16
    ) -> Linear:
        """shape: N, D, V. Responses of one length with one advantage each."""
        tokens, width, vocabulary = shape
        weight = random_head(device, width, vocabulary, dtype, seed)
        advantages = torch.randn(responses, generator=torch.Generator(device).manual_seed(seed), device=device)
        lengths = torch.full((responses,), tokens // responses)
        return cls.of(weight, lengths, advantages.repeat_interleave(tokens // responses), advantages, seed=seed)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    @property
    def learning(self) -> Tensor:
        """bool [N]."""
        return torch.ones_like(self.advantages, dtype=torch.bool) if self.kl_coef else self.advantages != 0

    @property
    def config(self) -> LossConfig:
        return LossConfig(kl="k3" if self.kl_coef else None, kl_coef=self.kl_coef, softcap=self.softcap)

    def loss(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """What a trainer writes around log-probs [n], of all tokens or of some."""
        terms = policy_terms(logps, self.old[rows], self.ref[rows], self.advantages[rows], self.kl_coef)
        return terms.sum() / len(self.tokens)


def random_head(device: torch.device, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[V, D], rows of norm about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype).div_(math.sqrt(width))


@torch.no_grad()
def expected_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """[N], near the policy's own without a product with the head: other tokens' logits are normal, |h|^2 / D wide."""
    own = torch.cat(
        [(h.float() * weight[i].float()).sum(-1) for h, i in zip(hidden.split(4096), ids.split(4096), strict=True)]
    )
    spread = torch.cat([h.float().square().mean(-1) for h in hidden.split(4096)])
    return -torch.nn.functional.softplus(math.log(len(weight) - 1) + spread / 2 - own)


def policy_terms(logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, kl_coef: float) -> Tensor:
    """Per token: the clipped objective, and kl_coef times k3 = exp(d) - d - 1 with d = ref - logp."""
    ratio = torch.exp(logps - old)
    terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if kl_coef:
        d = ref - logps
        terms = terms + kl_coef * (torch.exp(d) - d - 1)
    return terms


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


class Logits:
    """Logits [B, T, V], the leaf `leaf`, made anew from a copy before each call; ids and old log-probs [B, T]."""

    def __init__(
        self, device: torch.device, responses: int, length: int, vocabulary: int, *,
        dtype: torch.dtype = BF16, kl_coef: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        shape = (responses, length)
        self.given = torch.randn(*shape, vocabulary, generator=generator, device=device, dtype=dtype)
        self.tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
        sure = 5 + 15 * torch.rand(*shape, 1, generator=generator, device=device)
        self.given.scatter_add_(-1, self.tokens[..., None], sure.to(dtype))
        self.advantages = torch.randn(responses, generator=generator, device=device)
        rows, ids = self.given.flatten(0, 1), self.tokens.flatten()
        own = [token_logps(r.float(), i) for r, i in zip(rows.split(64), ids.split(64), strict=True)]
        self.old = (torch.cat(own) + 0.1 * torch.randn(len(ids), generator=generator, device=device)).view(shape)
        self.ref = self.old + 0.1 * torch.randn(shape, generator=generator, device=device)
        self.kl_coef = kl_coef
        self.leaf = self.given.clone().requires_grad_()

    @torch.no_grad()
    def renew(self) -> None:
        """In place, a call overwrites the logits."""
        self.leaf.copy_(self.given)

    @property
    def config(self) -> LossConfig:
        return LossConfig(kl="k3" if self.kl_coef else None, kl_coef=self.kl_coef)

    def loss(self, logps: Tensor) -> Tensor:
        return policy_terms(logps, self.old, self.ref, self.advantages[:, None], self.kl_coef).mean()


def padding(lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed tokens to rows of one length: int64 indices [B, T], 0 at padding; and which are tokens, bool [B, T]."""
    places = torch.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    return torch.where(mask, starts[:, None] + places, 0).to(device), mask.to(device)
