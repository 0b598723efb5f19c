"""Distillation beside what others compute: times in turns, and a call's peak memory, all in one process.

The student's three products and the teacher's one are the floor; the policy loss, which has no teacher, is beside it.
TRL's and Liger's losses are the generalised Jensen-Shannon divergence; both are given our hidden states and heads,
and TRL's the logits made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import linear_distill_loss, linear_prefix_loss

from . import turns
from .clock import Clock
from .inputs import random_head
from .step import Result, Step

LISTED = 20  # ids a row of a teacher that is served
BETA = 0.5
FLOOR, POLICY = "bare products", "prefixloss, policy loss"


class Pair(NamedTuple):
    """Hidden states [N, D] and heads [V, D] of a student, leaves, and of its teacher."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, device: torch.device, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Pair:
        generator = torch.Generator(device).manual_seed(0)
        # of a head whose rows have norm 1, logits about 3 wide
        hidden, teacher = 3 * torch.randn(2, tokens, width, generator=generator, device=device, dtype=dtype)
        heads = [random_head(device, width, vocabulary, dtype, seed) for seed in (1, 2)]
        return cls(hidden.clone().requires_grad_(), heads[0].requires_grad_(), teacher.clone(), heads[1])

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def products(data: Pair) -> Step:
    """The student's logits and both its gradients, and the teacher's logits: a library call each, into ready memory."""
    hidden, weight = data.hidden.detach(), data.weight.detach()
    logits, beside = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> Result:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(data.teacher_hidden, data.teacher_weight.T, out=beside)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
        return Result()

    return Step(forward, (), lambda _: None)


def ours(data: Pair, divergence: str) -> Step:
    def forward() -> Result:
        out = linear_distill_loss(
            *data.leaves, teacher_hidden=data.teacher_hidden, teacher_lm_head_weight=data.teacher_weight,
            divergence=divergence, beta=BETA,
        )  # fmt: skip
        return Result(out.loss)

    return Step(forward, data.leaves)


def ours_listed(data: Pair, divergence: str) -> Step:
    """The ids and log-probs come as a served teacher returns them: they are made before the clock starts."""
    parts = [(h @ data.teacher_weight.T).float().log_softmax(1).topk(LISTED) for h in data.teacher_hidden.split(256)]
    logps, ids = (torch.cat([part[i] for part in parts]) for i in range(2))

    def forward() -> Result:
        out = linear_distill_loss(*data.leaves, teacher_ids=ids, teacher_logps=logps, divergence=divergence, beta=BETA)
        return Result(out.loss)

    return Step(forward, data.leaves)


def policy(data: Pair) -> Step:
    """The policy loss of the same student, every token learning."""
    device, count = data.hidden.device, len(data.hidden)
    generator = torch.Generator(device).manual_seed(2)
    tokens = torch.randint(len(data.weight), (count,), generator=generator, device=device)
    advantages = torch.randn(count, generator=generator, device=device)
    return Step(lambda: Result(linear_prefix_loss(*data.leaves, tokens, advantages).loss), data.leaves)


def both_logits(data: Pair) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = (data.teacher_hidden @ data.teacher_weight.T).float()
    return (data.hidden @ data.weight.T).float(), teacher


def naive(data: Pair, divergence: str) -> Step:
    def forward() -> Result:
        a, b = (logits.log_softmax(1) for logits in both_logits(data))
        if divergence == "reverse":
            return Result((a.exp() * (a - b)).sum(1).mean())
        m = torch.logaddexp(a + math.log(1 - BETA), b + math.log(BETA))
        kl = [(x.exp() * (x - m)).sum(1).mean() for x in (a, b)]
        return Result((1 - BETA) * kl[0] + BETA * kl[1])

    return Step(forward, data.leaves)


def trl_jsd(data: Pair) -> Step:
    from trl.experimental.gkd import GKDTrainer  # noqa: PLC0415 (an optional peer)

    def forward() -> Result:
        loss = GKDTrainer.generalized_jsd_loss(*both_logits(data), beta=BETA, reduction="sum")
        return Result(loss / len(data.hidden))

    return Step(forward, data.leaves)


def liger_jsd(data: Pair) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415 (an optional peer)

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False)
    labels = torch.zeros(len(data.hidden), dtype=torch.int64, device=data.hidden.device)
    return Step(lambda: Result(loss(*data.leaves, data.teacher_hidden, data.teacher_weight, labels)), data.leaves)


METHODS: dict[str, Callable[[Pair], Step]] = {
    FLOOR: products,
    POLICY: policy,
    "prefixloss, reverse": lambda data: ours(data, "reverse"),
    "PyTorch, reverse": lambda data: naive(data, "reverse"),
    f"prefixloss, reverse, {LISTED} ids": lambda data: ours_listed(data, "reverse"),
    "prefixloss, jsd": lambda data: ours(data, "jsd"),
    "PyTorch, jsd": lambda data: naive(data, "jsd"),
    "TRL, jsd": trl_jsd,
    "Liger, jsd": liger_jsd,
}


def measure(data: Pair, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """A row a method, see `turns.measure`."""
    return turns.measure(METHODS, FLOOR, data, rounds, clock)
