"""The fused loss on a CPU beside bare matrix products, naive PyTorch, TRL and Liger: `python -m bench.cpu`.

One shape: 2,048 tokens, D 1,024, V 32,768, float32, two threads; forward and backward of the clipped policy loss with a
k3 KL penalty. Methods take turns, round by round, and a ratio is the median of the rounds' ratios, so that a change in
the machine's speed hits both sides. In its turn a method runs twice and the second call is timed, as in a training
loop: memory that another method has just given back is slow to get again. Memory is the peak of the process's resident
set above what it held before the call, gradients included, in a fresh process each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.files import write_whole
from prefixloss import LossConfig, linear_prefix_loss, prefix_loss

TOKENS, WIDTH, VOCABULARY, RESPONSES = 2048, 1024, 32768, 4
KL = LossConfig(kl="k3", kl_coef=0.05)
Method = Callable[[], Any]


class Inputs:
    """Leaves and recorded log-probs for `tokens` tokens; `logits` too where the loss starts from them."""

    def __init__(self, tokens: int = TOKENS, logits: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (tokens,), generator=generator)
        # near the log-probs that random logits give, so that ratios lie on both sides of the clip
        self.old = -11.0 + 0.2 * torch.randn(tokens, generator=generator)
        self.ref = self.old + 0.1 * torch.randn(tokens, generator=generator)
        # one advantage a response, which is all that Liger takes
        self.response_advantages = torch.tensor([0.7, -0.4, 1.1, -1.4])
        self.advantages = self.response_advantages.repeat_interleave(tokens // RESPONSES)
        if logits:
            self.logits = torch.randn(tokens, VOCABULARY, generator=generator).requires_grad_()
        else:
            self.hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
            self.weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 32).requires_grad_()

    def forget_gradients(self) -> None:
        for leaf in (getattr(self, name, None) for name in ("hidden", "weight", "logits")):
            if leaf is not None:
                leaf.grad = None

    def policy_loss(self, logps: Tensor) -> Tensor:
        """What a trainer writes around log-probs: clip and k3."""
        ratio = torch.exp(logps - self.old)
        policy = -torch.min(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages)
        d = self.ref - logps
        return (policy + 0.05 * (torch.exp(d) - d - 1)).mean()


def products(data: Inputs, share: float = 1.0) -> Method:
    """The floor: the three bare matrix products of the tokens that learn."""
    rows = int(len(data.tokens) * share)
    hidden, weight = data.hidden.detach()[:rows], data.weight.detach()

    def step() -> None:
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden

    return step


def fused(data: Inputs, share: float = 1.0) -> Method:
    """`linear_prefix_loss`; below a share of 1 only that share of the tokens has an advantage, and there is no KL."""
    advantages, config = data.advantages, KL
    if share < 1:
        keep = torch.arange(len(data.tokens)) * share % 1 < share
        advantages, config = advantages * keep, LossConfig()

    def step() -> None:
        out = linear_prefix_loss(
            data.hidden,
            data.weight,
            data.tokens,
            advantages,
            old_logps=data.old,
            ref_logps=data.ref,
            config=config,
        )
        out.loss.backward()

    return step


def naive(data: Inputs) -> Method:
    def step() -> None:
        logps = (data.hidden @ data.weight.T).log_softmax(-1).gather(1, data.tokens[:, None]).squeeze(1)
        data.policy_loss(logps).backward()

    return step


def trl(data: Inputs) -> Method:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415 (an optional peer)

    def step() -> None:
        # TRL's own tile, 32,768 columns wide
        logps = ChunkedLogProbFunction.apply(data.hidden, data.weight, None, data.tokens, 1.0, 32768, None, 1.0, ())[0]
        data.policy_loss(logps).backward()

    return step


def liger(data: Inputs, compiled: bool) -> Method:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415 (an optional peer)

    loss = LigerFusedLinearGRPOLoss(beta=0.05, compiled=compiled)

    def by_response(x: Tensor) -> Tensor:
        return x.reshape(RESPONSES, -1, *x.shape[1:])

    def step() -> None:
        out = loss(
            by_response(data.hidden),
            data.weight,
            by_response(data.tokens),
            torch.ones(RESPONSES, len(data.tokens) // RESPONSES),
            data.response_advantages,
            ref_per_token_logps=by_response(data.ref),
            old_per_token_logps=by_response(data.old),
        )
        (out[0] if isinstance(out, tuple) else out).backward()

    return step


def fused_logits(data: Inputs, inplace: bool) -> Method:
    def step() -> None:
        out = prefix_loss(
            data.logits,
            data.tokens,
            data.advantages,
            old_logps=data.old,
            ref_logps=data.ref,
            inplace=inplace,
            config=KL,
        )
        out.loss.backward()

    return step


def naive_logits(data: Inputs) -> Method:
    def step() -> None:
        logps = data.logits.log_softmax(-1).gather(1, data.tokens[:, None]).squeeze(1)
        data.policy_loss(logps).backward()

    return step


def copy_logits(data: Inputs) -> Method:
    """The floor from logits: read each once and write its gradient once."""
    target = torch.empty_like(data.logits)
    return lambda: target.copy_(data.logits.detach())


def round_times(methods: dict[str, Method], data: Inputs, rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of every method in every round: of the second of two calls in a row."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in track(range(rounds), description=label, console=Console(stderr=True), transient=True):
        for name, step in methods.items():
            step()
            data.forget_gradients()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
            data.forget_gradients()
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_memory(method: str, tokens: int) -> int:
    """Peak bytes above the inputs of one call, gradients included. Runs in a process of its own."""
    data = Inputs(tokens)
    step = {"fused": fused, "naive": naive}[method](data)
    small = Inputs(RESPONSES)
    {"fused": fused, "naive": naive}[method](small)()  # loads libraries and their buffers
    small.forget_gradients()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def memory_of(method: str, tokens: int) -> int:
    command = [sys.executable, "-m", "bench.cpu", "--memory", method, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(rounds: int) -> list[dict[str, Any]]:
    """One row a target: what was measured, the ratio, and its limit."""
    linear = Inputs()
    methods: dict[str, Method] = {
        "products": products(linear),
        "fused": fused(linear),
        "naive": naive(linear),
        "products 40 %": products(linear, 0.4),
        "fused 40 %": fused(linear, 0.4),
        "TRL": trl(linear),
        "Liger": liger(linear, compiled=False),
        "Liger compiled": liger(linear, compiled=True),
    }
    times = round_times(methods, linear, rounds, "from hidden states")
    del linear, methods
    logits = Inputs(logits=True)
    from_logits = {
        "copy": copy_logits(logits),
        "fused logits": fused_logits(logits, inplace=False),
        "naive logits": naive_logits(logits),
        "fused logits in place": fused_logits(logits, inplace=True),
    }
    times |= round_times(from_logits, logits, rounds, "from logits")
    del logits, from_logits
    memory = {name: memory_of(*name) for name in (("fused", TOKENS), ("naive", TOKENS), ("fused", 16 * TOKENS))}
    # what 16 x the tokens may add: the gradient of the hidden states, float32
    gradient = 15 * TOKENS * WIDTH * 4

    def row(what: str, name: str, base: str, limit: float | None) -> dict[str, Any]:
        seconds = {name: statistics.median(times[name]), base: statistics.median(times[base])}
        return {"what": what, "measured": seconds, "unit": "s", "ratio": ratio(times, name, base), "limit": limit}

    def memory_row(what: str, got: int, base: int, limit: float) -> dict[str, Any]:
        return {
            "what": what,
            "measured": {"prefixloss": got, "base": base},
            "unit": "B",
            "ratio": got / base,
            "limit": limit,
        }

    return [
        row("linear_prefix_loss / three bare products", "fused", "products", 1.2),
        row("linear_prefix_loss / naive PyTorch", "fused", "naive", 1.0),
        row("linear_prefix_loss / TRL ChunkedLogProbFunction", "fused", "TRL", 0.5),
        row("linear_prefix_loss / Liger fused linear GRPO", "fused", "Liger", 0.9),
        row("linear_prefix_loss / Liger, compiled", "fused", "Liger compiled", 0.9),
        row("40 % learning / bare products of those", "fused 40 %", "products 40 %", 1.3),
        row("40 % learning / all learning", "fused 40 %", "fused", None),
        row("prefix_loss / naive PyTorch", "fused logits", "naive logits", 0.5),
        row("prefix_loss in place / naive PyTorch", "fused logits in place", "naive logits", None),
        row("prefix_loss / copying the logits", "fused logits", "copy", None),
        memory_row("peak memory / naive", memory["fused", TOKENS], memory["naive", TOKENS], 0.4),
        memory_row(
            "memory that 16 x the tokens add / gradient of the hidden states",
            memory["fused", 16 * TOKENS] - memory["fused", TOKENS],
            gradient,
            1.0,
        ),
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{TOKENS:,} tokens, D {WIDTH:,}, V {VOCABULARY:,}, float32, forward and backward, k3 KL")
    for column, justify in (("", "left"), ("ours", "right"), ("base", "right"), ("ratio", "right"), ("limit", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for r in rows:
        scale, unit = (1e3, "ms") if r["unit"] == "s" else (2**-20, "MiB")
        ours, base = (f"{value * scale:,.0f} {unit}" for value in r["measured"].values())
        limit = "" if r["limit"] is None else f"{r['limit']:.2f}"
        over = r["limit"] is not None and r["ratio"] > r["limit"]
        colour = "red" if over else "green" if r["limit"] else "white"
        table.add_row(r["what"], ours, base, f"[{colour}]{r['ratio']:.2f}[/]", limit)
    Console(width=120).print(table)


def write_json(path: Path, rows: list[dict[str, Any]], rounds: int) -> None:
    """Whole or not at all."""
    cpu = next((x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    record = {
        "device": f"{cpu}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": {"tokens": TOKENS, "D": WIDTH, "V": VOCABULARY, "dtype": "float32"},
        "rounds": rounds,
        "rows": rows,
    }
    write_whole(path, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory:
        print(measure_memory(arguments.memory[0], int(arguments.memory[1])))
        return
    rows = run(arguments.rounds)
    show(rows)
    if arguments.json:
        write_json(arguments.json, rows, arguments.rounds)


if __name__ == "__main__":
    main()
