"""Rows of the benchmark that are times and memory, ours beside others."""

from __future__ import annotations

import math

import torch

from prefixloss import linear_prefix_loss

from ..speed.from_hidden import (
    bare_products,
    chunked_products,
    liger,
    our_logps,
    ours,
    trl,
    trl_logps,
    with_gradient,
    without_gradient,
)
from ..speed.from_logits import copy_logits, liger_from_logits, naive_from_logits, ours_from_logits
from ..speed.inputs import BF16
from ..speed.step import Result, Step
from .measure import Bench, Make
from .targets import BOUNDED, SPARSE


def from_hidden(bench: Bench) -> None:
    data = bench.linear("hidden", bench.shapes.tokens)
    # spread evenly: neighbours in memory never learn together
    learn = torch.arange(len(data.tokens), device=bench.device) * 0.4 % 1 < 0.4
    some, count = data.advantages * learn, int(learn.sum())
    methods: dict[str, Make] = {
        "three products": lambda: bare_products(data),
        "our products alone": lambda: chunked_products(data),
        "ours": lambda: ours(data, bench.backend),
        SPARSE: lambda: ours(data, bench.backend, some),
        BOUNDED: lambda: ours(data, bench.backend, some, max_learning_tokens=count),
        "TRL": lambda: trl(data),
        "Liger": lambda: liger(data, compiled=False),
    }
    bench.measure("hidden", methods, seconds=60)
    weight = data.weight.numel()
    summed = f"the head's gradient is summed in float32: {4 * weight} bytes, of which {2 * weight} are returned"
    bench.case("hidden")["notes"].append(summed)


def more_tokens(bench: Bench) -> None:
    data = bench.linear("memory", bench.shapes.tokens_for_memory)
    bench.measure("memory", {"ours": lambda: ours(data, bench.backend)}, seconds=5)


def from_logits(bench: Bench) -> None:
    data = bench.logits("logits", bench.shapes.responses, bench.shapes.length)
    methods: dict[str, Make] = {
        "copy": lambda: copy_logits(data),
        "ours in place": lambda: ours_from_logits(data, bench.backend, inplace=True),
        "ours": lambda: ours_from_logits(data, bench.backend, inplace=False),
        "naive": lambda: naive_from_logits(data),
        "Liger in place": lambda: liger_from_logits(data, inplace=True),
        "Liger": lambda: liger_from_logits(data, inplace=False),
    }
    bench.measure("logits", methods)
    add_bandwidth(bench, "logits", 4 * data.given.numel())


def add_bandwidth(bench: Bench, case: str, moved: int) -> None:
    """Bytes a second, counting each logit read once and each gradient written once."""
    for name in ("copy", "ours in place", "ours"):
        figures = bench.method(case, name)
        if "seconds" in figures:
            figures["bytes_per_second"] = moved / figures["seconds"]


def log_probs(bench: Bench) -> None:
    data = bench.linear("logps", bench.shapes.tokens_for_logps)
    gradient = torch.randn(data.old.shape, device=bench.device)
    frozen = data.weight.detach()
    methods: dict[str, Make] = {
        "three products": lambda: bare_products(data),
        "ours": lambda: with_gradient(our_logps(data, bench.backend), gradient, data.leaves),
        "TRL": lambda: with_gradient(trl_logps(data), gradient, data.leaves),
        "one product": lambda: bare_products(data, 1),
        "ours, forward": lambda: without_gradient(our_logps(data, bench.backend)),
        "TRL, forward": lambda: without_gradient(trl_logps(data)),
        "two products": lambda: bare_products(data, 2),
        "ours, frozen head": lambda: with_gradient(our_logps(data, bench.backend, frozen), gradient, data.leaves),
        "TRL, frozen head": lambda: with_gradient(trl_logps(data, frozen), gradient, data.leaves),
    }
    bench.measure("logps", methods)


def long_response(bench: Bench) -> None:
    """One packed response of which 5 % learns."""
    shape = (bench.shapes.long_response, bench.shapes.long_width, bench.shapes.vocabulary)
    bench.case("long")["shape"] = dict(zip(("tokens", "D", "V"), shape, strict=True))
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=bench.device, dtype=BF16).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=bench.device, dtype=BF16) / math.sqrt(width)).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), device=bench.device)
    advantages = torch.zeros(tokens, device=bench.device)
    advantages[::20] = torch.randn(len(advantages[::20]), device=bench.device)
    offsets = torch.tensor([0, tokens], device=bench.device)

    def forward() -> Result:
        out = linear_prefix_loss(hidden, weight, ids, advantages, cu_seqlens=offsets, backend=bench.backend)
        return Result(out.loss, out.logps)

    bench.measure("long", {"ours": lambda: Step(forward, (hidden, weight))}, seconds=5)


def few_rows(bench: Bench) -> None:
    """A batch so small that several programs share a row."""
    data = bench.logits("few", 1, bench.shapes.few_rows)
    methods: dict[str, Make] = {
        "copy": lambda: copy_logits(data),
        "ours in place": lambda: ours_from_logits(data, bench.backend, inplace=True),
        "ours": lambda: ours_from_logits(data, bench.backend, inplace=False),
    }
    bench.measure("few", methods)
    add_bandwidth(bench, "few", 4 * data.given.numel())
