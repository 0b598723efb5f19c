"""Rows of the benchmark that are errors: against float64, between runs, between a whole and its halves."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss import linear_prefix_loss, prefix_loss

from ..speed.inputs import BF16, Linear
from .measure import Bench, differing
from .shapes import DRAWS


def many_logits(bench: Bench) -> None:
    """More logits than 32 bits can number: each row's results, bit for bit, as in two halves."""
    rows, vocabulary = bench.shapes.many_rows, bench.shapes.vocabulary
    bench.case("many")["shape"] = {"logits": [rows, vocabulary]}
    logits = torch.randn(rows, vocabulary, device=bench.device, dtype=BF16)
    ids = torch.randint(vocabulary, (rows,), device=bench.device)
    advantages = torch.randn(rows, device=bench.device)

    def run(here: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-probs and gradient of some rows, weighted as in the whole."""
        leaf = logits[here].detach().requires_grad_()
        out = prefix_loss(leaf, ids[here], advantages[here], normalizer=float(rows), backend=bench.backend)
        out.loss.backward()
        assert leaf.grad is not None
        return out.loss.detach(), out.logps, leaf.grad

    with bench.guarded("many", "ours"):
        loss, logps, grads = run(slice(0, rows))
        count, of_halves = 0, 0.0
        for here in (slice(0, rows // 2), slice(rows // 2, rows)):
            part = run(here)
            count += differing(logps[here], part[1]) + differing(grads[here], part[2])
            of_halves += part[0].item()
            del part
        figures = {"differing": count, "loss": loss.item(), "loss_of_halves": of_halves}
        bench.method("many", "ours").update(figures)


class Answer(NamedTuple):
    loss: Tensor
    logps: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def answer(data: Linear, logps_of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Answer:
    """By autograd through log-probs of hidden states and head, which are leaves of this dtype."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in data.leaves)
    logps = logps_of(hidden, weight)
    loss = data.loss(logps)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return Answer(loss.detach(), logps.detach(), d_hidden, d_weight)


def our_answer(data: Linear, backend: str) -> Answer:
    hidden, weight = (x.detach().requires_grad_() for x in data.leaves)
    out = linear_prefix_loss(hidden, weight, data.tokens, data.advantages, old_logps=data.old, backend=backend)
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    return Answer(out.loss.detach(), out.logps, d_hidden, d_weight)


def formula(data: Linear, logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, data.tokens[:, None]).squeeze(1)


def dense_logps(data: Linear, hidden: Tensor, weight: Tensor) -> Tensor:
    return formula(data, hidden @ weight.T)


def trl_answer(data: Linear) -> Answer:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415 (an optional peer)

    return answer(
        data, lambda h, w: ChunkedLogProbFunction.apply(h, w, None, data.tokens, 1.0, 32768, None, 1.0, ())[0], BF16
    )


def errors(bench: Bench) -> None:
    """Relative errors against float64, root mean square over entries and draws; and whether two runs agree."""
    bench.case("errors")["shape"] = dict(zip(("tokens", "D", "V"), bench.shapes.exact, strict=True)) | {"draws": DRAWS}
    methods: dict[str, Callable[[Linear], Answer]] = {
        "ours": lambda data: our_answer(data, bench.backend),
        "naive float32": lambda data: answer(data, lambda h, w: formula(data, h.float() @ w.float().T), BF16),
        "naive, bf16 logits": lambda data: answer(data, lambda h, w: formula(data, (h @ w.T).float()), BF16),
        "TRL": trl_answer,
    }
    draws = [Linear.random(bench.device, bench.shapes.exact, bench.shapes.responses, seed) for seed in range(DRAWS)]
    truths = [answer(data, partial(dense_logps, data), torch.float64) for data in draws]
    for name, method in methods.items():
        with bench.guarded("errors", name):
            answers = [method(data) for data in draws]
            bench.method("errors", name).update(
                {field: error_of(answers, truths, at) for at, field in enumerate(Answer._fields)}
            )
    with bench.guarded("errors", "ours"):
        pairs = [zip(*(our_answer(data, bench.backend) for _ in range(2)), strict=True) for data in draws]
        bench.method("errors", "ours")["differing"] = sum(differing(a, b) for pair in pairs for a, b in pair)


def error_of(answers: list[Answer], truths: list[Answer], field: int) -> float:
    wrong = sum(float((a[field].double() - t[field]).square().sum()) for a, t in zip(answers, truths, strict=True))
    return math.sqrt(wrong / sum(float(t[field].square().sum()) for t in truths))
