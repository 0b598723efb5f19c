"""A model's own hidden states, head and tokens: how dense its gradient is, and what a gradient tolerance saves on it.

Responses are run through the model once. Then every token learns, on policy, with an advantage of 1: errors are against
float64 on the first tokens, times are in turns in one process. The tolerances of the rows are what "auto" is for
bfloat16, in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import LossConfig, linear_logps
from prefixloss.backends import memory
from prefixloss.backends.columns import Columns
from prefixloss.backends.tolerance import of_products
from prefixloss.backends.torch import entries
from prefixloss.detect.records import Record, read_records

from ..tolerance import leaving_out
from . import turns
from .clock import Clock
from .from_hidden import bare_products, compiled, cut_cross_entropy, liger, naive, ours, torch_fused, trl
from .inputs import Linear, capped
from .step import Step

QUANTILES = (0.5, 0.75, 0.9, 0.99)
TOLERANCES = (2.0**-9, 2.0**-10, 2.0**-11, 2.0**-12)
FLOOR, EXACT = "bare products", "prefixloss"
FEW = 512  # tokens of which errors are measured
_AT_ONCE = 8  # responses in a call of the model


class Taken(NamedTuple):
    """hidden [N, D] and weight [V, D] in float32, tokens int64 [N], tokens a response [B]."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    lengths: Tensor
    softcap: float | None = None

    def first(self, count: int) -> Taken:
        ends = self.lengths.cumsum(0).clamp(max=count)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        return Taken(self.hidden[:count], self.weight, self.tokens[:count], lengths[lengths > 0], self.softcap)

    def linear(self, dtype: torch.dtype) -> Linear:
        """On policy, by leaves of that dtype."""
        hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        with torch.no_grad():
            old = linear_logps(hidden, weight, self.tokens, softcap=self.softcap).logps
        ones = torch.ones(len(self.tokens), dtype=torch.float32)
        by_response = torch.ones(len(self.lengths), dtype=torch.float32)
        return Linear(hidden, weight, self.tokens, ones, old, old, self.lengths, by_response, softcap=self.softcap)


def response_of(record: Record) -> str:
    """Steps that end in spaces or newlines bring along what was between them."""
    if "steps" not in record.source:
        return str(record.source["response"])
    return ("" if any(step != step.rstrip() for step in record.steps) else "\n").join(record.steps)


@torch.no_grad()
def take(model: str, file: Path, tokens: int) -> Taken:
    """The first tokens of the responses in a file, and the states that predict them. ValueError where the file or the
    model cannot be used."""
    from transformers import AutoConfig  # noqa: PLC0415 (an extra)

    from prefixloss.rl.policy import load_policy  # noqa: PLC0415 (needs transformers)

    records = read_records(file, "plain")
    policy = load_policy(model)
    # what was trained here is asked as it was then
    policy.instruction = getattr(AutoConfig.from_pretrained(model), "prefixloss_instruction", policy.instruction)
    if policy.bias is not None:
        raise ValueError(f"--model: the head of {model!r} has a bias, which the methods beside ours do not take")
    hidden: list[Tensor] = []
    ids: list[Tensor] = []
    for start in range(0, len(records), _AT_ONCE):
        some = records[start : start + _AT_ONCE]
        written = policy.written([r.problem for r in some], [response_of(r) for r in some])
        states = policy.hidden(written)
        hidden += [row[mask] for row, mask in zip(states, written.mask, strict=True)]
        ids += [row[mask] for row, mask in zip(written.tokens, written.mask, strict=True)]
        if sum(map(len, ids)) >= tokens:
            break
    lengths = torch.tensor([len(row) for row in ids])
    # a factor of the logits is one of the hidden states
    taken = Taken(torch.cat(hidden) * policy.logit_scale, policy.weight, torch.cat(ids), lengths, policy.softcap)
    return taken.first(tokens)


def entropies(data: Taken) -> Tensor:
    with torch.no_grad():
        found = linear_logps(data.hidden, data.weight, data.tokens, softcap=data.softcap, entropy=True).entropy
    assert found is not None
    return found


def gradient_of(data: Taken, rows: slice) -> Tensor:
    """[n, V]: of the log-probs with respect to the logits."""
    logits = capped(data.hidden[rows] @ data.weight.T, data.softcap)
    slope = None if data.softcap is None else 1 - (logits / data.softcap).square()
    gradient = logits.softmax(1).neg_()
    own = data.tokens[rows, None]
    gradient.scatter_(1, own, 0.0)
    gradient.scatter_(1, own, -gradient.sum(1, keepdim=True))  # 1 - p, and no cancellation
    return gradient if slope is None else gradient.mul_(slope)


@torch.no_grad()
def density(data: Taken, tolerances: tuple[float, ...]) -> list[dict[str, float]]:
    """What each tolerance keeps of the logits' gradient, however much that is: the share of the entries, the share of
    rows with none, the share of the vocabulary with any, and what is left out of the gradient's norm."""
    count, vocabulary = len(data.tokens), len(data.weight)
    size = memory.chunk_rows(count, count, 4 * vocabulary, data.hidden.device, None)
    kept = dict.fromkeys(tolerances, 0)
    empty, touched = dict(kept), {t: torch.zeros(vocabulary, dtype=torch.bool) for t in tolerances}
    chosen = {t: entries.Tolerance(t, 0.0, Columns(vocabulary)) for t in tolerances}
    with leaving_out():
        for start in range(0, count, size):
            gradient = gradient_of(data, slice(start, start + size))
            for t in tolerances:
                found = chosen[t].split(gradient)[0]
                assert found is not None
                kept[t] += len(found.value)
                empty[t] += len(gradient) - len(found.row.unique())
                touched[t][found.column] = True
    return [
        {
            "tolerance": t, "kept": kept[t] / count / vocabulary, "rows_with_none": empty[t] / count,
            "head_rows": float(touched[t].float().mean()), "left_out": chosen[t].left_out(),
        }
        for t in tolerances
    ]  # fmt: skip


def methods(vocabulary: int) -> dict[str, Callable[[Linear], Step]]:
    """By name, with the tolerances of ours in it."""
    hidden, head = of_products(("auto", "auto"), (torch.bfloat16, torch.bfloat16), (True, True), vocabulary)

    def tolerant(hidden: float, head: float) -> Callable[[Linear], Step]:
        def make(data: Linear) -> Step:
            options = {"softcap": data.softcap, "gradient_tolerance": hidden, "head_gradient_tolerance": head}
            return ours(data, config=LossConfig(**options))  # type: ignore[arg-type]

        return make

    return {
        FLOOR: bare_products,
        EXACT: ours,
        f"{EXACT}, {hidden:.1e} and {head:.1e}": tolerant(hidden, head),
        f"{EXACT}, {hidden:.1e}, the head exact": tolerant(hidden, 0.0),
        "PyTorch": naive,
        "PyTorch, compiled": compiled,
        "torch linear_cross_entropy": torch_fused,
        "TRL chunked log-probs": trl,
        "Liger chunked GRPO": liger,
        "Cut Cross-Entropy": cut_cross_entropy,
    }


def errors_of(make: Callable[[Linear], Step], data: Linear, truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Of the gradients of hidden states and head, in norm and relative to the truth's."""
    step = make(data)
    step.start_again()
    step()
    found = [_packed(leaf, data) for leaf in step.leaves]
    step.start_again()
    names = ("d_hidden", "d_weight")
    return {
        name: float((got.double() - exact).norm() / exact.norm())
        for name, got, exact in zip(names, found, truth, strict=True)
    }


def _packed(leaf: Tensor, data: Linear) -> Tensor:
    """Its gradient; of a padded leaf, of the tokens that there are."""
    assert leaf.grad is not None
    if leaf.dim() < 3:
        return leaf.grad
    return torch.cat([row[:length] for row, length in zip(leaf.grad, data.lengths.tolist(), strict=True)])


def measure(taken: Taken, dtype: torch.dtype, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """A row a method: see `turns.measure`, and its errors."""
    every = methods(len(taken.weight))
    few = taken.first(FEW)
    exact = few.linear(torch.float64)
    ours(exact)()
    truth = exact.hidden.grad, exact.weight.grad
    assert truth[0] is not None
    assert truth[1] is not None
    small = few.linear(dtype)
    wrong = {}
    for name, make in every.items():
        try:
            wrong[name] = errors_of(make, small, truth) if name != FLOOR else {}  # type: ignore[arg-type]
        except Exception:  # its row will say why
            wrong[name] = {}
    rows = turns.measure(every, FLOOR, taken.linear(dtype), rounds, clock)
    return [{**row, **wrong[row["method"]]} for row in rows]
