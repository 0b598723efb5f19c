"""Errors against float64, on few tokens of the case's own head: root mean squares over entries and draws, relative.

The truth is written here once more, in float64 and block by block of the vocabulary, and shares no code with the
package. The head's gradient is compared in the rows of the tokens and in `ROWS` others. A bfloat16 gradient's own
rounding is about 2e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .inputs import Linear, Logits, policy_terms, random_head
from .settings import SETTINGS, credit_of
from .step import Step

TOKENS, DRAWS, ROWS, BLOCK = 64, 4, 4096, 8192
Truth = dict[str, Tensor]


def inputs(case: Case, device: torch.device) -> Iterator[Linear | Logits]:
    """Some draws of few tokens in the dense setting, in which every method can take part."""
    dtype, setting = getattr(torch, case.dtype), SETTINGS["dense"]
    if case.start == "logits":
        for seed in range(DRAWS):
            yield Logits(
                device, 8, TOKENS // 8, case.head.vocabulary, dtype=dtype, kl_coef=setting.kl_coef, seed=seed + 1
            )
        return
    weight = random_head(device, case.head.width, case.head.vocabulary, dtype)
    for seed in range(DRAWS):
        credit = credit_of(TOKENS, setting, seed)
        yield Linear.of(weight, *credit, kl_coef=setting.kl_coef, softcap=case.head.softcap, seed=seed + 1)


def compared_rows(data: Linear) -> Tensor:
    """Rows of the head whose gradient is compared: the tokens' own, and others spread evenly."""
    vocabulary = len(data.weight)
    spread = torch.arange(0, vocabulary, max(1, vocabulary // ROWS), device=data.weight.device)
    return torch.cat([data.tokens, spread]).unique()


@torch.no_grad()
def truth_of(data: Linear | Logits) -> Truth:
    """Loss, log-probs and gradients in float64."""
    if isinstance(data, Logits):
        return _truth_from_logits(data)
    hidden, tokens = data.hidden.double(), data.tokens
    blocks = data.weight.detach().split(BLOCK)
    raw = torch.cat([hidden @ block.double().T for block in blocks], 1)
    capped = raw if data.softcap is None else data.softcap * torch.tanh(raw / data.softcap)
    slope = torch.ones(()) if data.softcap is None else 1 - (capped / data.softcap) ** 2
    found, d_logits = _through_softmax(capped, tokens, data.old, data.ref, data.advantages, data.kl_coef)
    d_logits *= slope
    d_hidden = sum(d @ block.double() for d, block in zip(d_logits.split(BLOCK, 1), blocks, strict=True))
    d_weight = d_logits[:, compared_rows(data)].T @ hidden
    assert isinstance(d_hidden, Tensor)
    return {**found, "d_hidden": d_hidden, "d_weight": d_weight}


def _truth_from_logits(data: Logits) -> Truth:
    rows = data.given.flatten(0, 1).double()
    advantages = data.advantages[:, None].expand_as(data.old).flatten()
    found, d_logits = _through_softmax(
        rows, data.tokens.flatten(), data.old.flatten(), data.ref.flatten(), advantages, data.kl_coef
    )
    return {**found, "d_logits": d_logits}


def _through_softmax(
    logits: Tensor, tokens: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, kl_coef: float
) -> tuple[Truth, Tensor]:
    """Loss, its terms' mean size, log-probs [N]; and d loss / d logits [N, V] = g (onehot - p), g = d loss / d logp."""
    every = torch.arange(len(tokens), device=tokens.device)
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    logps = log_p[every, tokens]
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        terms = policy_terms(leaf, old.double(), ref.double(), advantages.double(), kl_coef)
        (coefficient,) = torch.autograd.grad(terms.mean(), leaf)
    d_logits = log_p.exp_().mul_(-coefficient[:, None])
    d_logits[every, tokens] += coefficient
    terms = terms.detach()
    return {"loss": terms.mean(), "loss_scale": terms.abs().mean(), "logps": logps}, d_logits


def answer_of(step: Step, data: Linear | Logits) -> Truth:
    """What a method makes of it, in the truth's shapes; without log-probs where it gives none."""
    step.start_again()
    result = step.forward()
    step.backward(result)
    assert result.loss is not None
    found = {"loss": result.loss.detach()}
    if result.logps is not None:
        found["logps"] = result.logps.flatten()
    first, *rest = (leaf.grad for leaf in step.leaves)
    assert first is not None
    if isinstance(data, Logits):
        length = data.given.shape[1]
        return {**found, "d_logits": first[:, :length].flatten(0, 1)}
    assert rest
    assert rest[0] is not None
    return {**found, "d_hidden": first.reshape(data.hidden.shape), "d_weight": rest[0][compared_rows(data)]}


class Wrong:
    """Squared errors and squared truths, summed over draws."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.repeats = True

    def add(self, found: Truth, truth: Truth, again: Truth) -> None:
        for name, value in found.items():
            wrong, whole = self.sums.setdefault(name, [0.0, 0.0])
            error = float((value.double() - truth[name]).square().sum())
            # terms of both signs nearly cancel in the loss: its error is measured against their size
            size = truth["loss_scale" if name == "loss" else name]
            self.sums[name] = [wrong + error, whole + float(size.square().sum())]
            self.repeats &= torch.equal(value, again[name])

    def relative(self) -> dict[str, Any]:
        by_name = {name: math.sqrt(wrong / whole) if whole else 0.0 for name, (wrong, whole) in self.sums.items()}
        return {"tokens": TOKENS, "draws": DRAWS, **by_name}
