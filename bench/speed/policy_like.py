"""What a gradient tolerance saves on the head of a trained policy, and that it costs nothing on a flat one.

    python -m bench.speed.policy_like --tokens 2048 --vocabulary 32768 --dtype float32

Times of forward and backward beside the three bare products in the same chunks and dtype, round after round in one
process: medians of the ratios. The processor's time of one thread by default, which other work on the machine moves
little; with more threads the clock's. Errors are against float64. "tolerant" is the tolerance that "auto" is for
bfloat16, in every dtype.

The policy-like head, by formula: rows of the head normal / sqrt(D); tokens by Zipf's law; hidden states twice normal,
plus 24 (four tokens in five) or 17 times the direction of the token's own row, and 8 or 15 times that of each of six
other rows: a row's direction is the row over its squared norm, so that these are what they add to its logit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss
from prefixloss.backends import memory
from prefixloss.backends.tolerance import of_products

QUANTILES = (0.5, 0.75, 0.99)
SURE, LESS_SURE, OTHERS = (24.0, 8.0), (17.0, 15.0), 6


class Data(NamedTuple):
    """hidden [N, D], weight [V, D], tokens int64 [N]."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor


def policy_like(tokens: int, width: int, vocabulary: int, *, flat: bool = False, seed: int = 0) -> Data:
    """In float32. flat: half as much noise, and no row preferred."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)
    zipf = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(zipf, tokens, replacement=True, generator=generator)
    noise = torch.randn(tokens, width, generator=generator)
    if flat:
        return Data(noise / 2, weight, ids)
    sure = torch.rand(tokens, generator=generator) < 0.8
    own, other = (torch.where(sure, *pair)[:, None] for pair in zip(SURE, LESS_SURE, strict=True))
    hidden = 2 * noise + own * direction(weight, ids)
    for _ in range(OTHERS):
        hidden += other * direction(weight, torch.randint(vocabulary, (tokens,), generator=generator))
    return Data(hidden, weight, ids)


def direction(weight: Tensor, ids: Tensor) -> Tensor:
    rows = weight[ids]
    return rows / rows.square().sum(1, keepdim=True)


def entropies(data: Data) -> Tensor:
    with torch.no_grad():
        found = linear_logps(*data, entropy=True, backend="torch").entropy
    assert found is not None
    return found


class Made(NamedTuple):
    """The gradients of hidden and weight, and which share was left out of the logits' gradient."""

    hidden: Tensor
    weight: Tensor
    left_out: float


def loss(data: Data, hidden: float, head: float) -> Made:
    """Every token learns, on policy."""
    leaves = [x.detach().requires_grad_() for x in data[:2]]
    config = LossConfig(objective="reinforce", gradient_tolerance=hidden, head_gradient_tolerance=head)
    ones = torch.ones(len(data.tokens), dtype=torch.float32)
    out = linear_prefix_loss(leaves[0], leaves[1], data.tokens, ones, config=config, backend="torch")
    d_hidden, d_weight = torch.autograd.grad(out.loss, leaves)
    return Made(d_hidden, d_weight, float(out.metrics["gradient_left_out"]))


def products(data: Data) -> None:
    """The three bare products, in the loss's chunks."""
    hidden, weight, _ = data
    count, vocabulary = len(hidden), len(weight)
    size = memory.chunk_rows(count, count, 4 * vocabulary, hidden.device, None)
    logits, total = hidden.new_empty(size, vocabulary), memory.zeros(weight.shape, weight.dtype, weight.device)
    for rows in hidden.split(size):
        here = logits[: len(rows)]
        torch.mm(rows, weight.t(), out=here)
        torch.mm(here, weight)
        total.addmm_(here.t(), rows)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--flat", action="store_true", help="a flat head instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-errors", action="store_true", help="no float64, which takes twice as long as a round")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    data = policy_like(given.tokens, given.width, given.vocabulary, flat=given.flat)
    found = torch.quantile(entropies(data), torch.tensor(QUANTILES)).tolist()
    pairs = ", ".join(f"{q:g}: {x:.2g}" for q, x in zip(QUANTILES, found, strict=True))
    print(f"entropy in nats, quantiles {pairs}")
    half = torch.bfloat16, torch.bfloat16
    both = of_products(("auto", "auto"), half, (True, True), given.vocabulary)
    ways = {"exact": (0.0, 0.0), "both tolerant": both, "exact head": (both[0], 0.0)}
    if not given.no_errors:
        exact = loss(Data(data.hidden.double(), data.weight.double(), data.tokens), 0.0, 0.0)
        for name, way in ways.items():
            made = loss(data, *way)
            touched = float((made.weight != 0).any(1).float().mean())
            print(
                f"{name}: error of d hidden {error(made.hidden, exact.hidden):.1e}, of d head "
                f"{error(made.weight, exact.weight):.1e}; left out {made.left_out:.1e}; head rows touched {touched:.0%}"
            )
        del exact, made
    dtype = getattr(torch, given.dtype)
    cast = Data(data.hidden.to(dtype), data.weight.to(dtype), data.tokens)
    ratios: dict[str, list[float]] = {name: [] for name in ways}

    def timed(step: Callable[[], object]) -> float:
        start = clock()
        step()
        return clock() - start

    for turn in range(1 + given.rounds):
        floor = timed(lambda: products(cast))
        for name, way in ways.items():
            ratio = timed(lambda way=way: loss(cast, *way)) / floor  # type: ignore[misc]
            if turn:  # the first warms up
                ratios[name].append(ratio)
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name}: {statistics.median(values):.2f} of the three bare {given.dtype} products ({spread})")


if __name__ == "__main__":
    main()
