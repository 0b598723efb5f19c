"""The fused loss on one GPU beside bare products, a copy, naive PyTorch, TRL and Liger: `bash bench/gpu/run.sh`.

bf16, random data, the clipped policy loss averaged over tokens. Methods take turns, round by round, and a ratio is the
median of the rounds' ratios, so that a change in clocks hits both sides. A time is the device's own, between two
events. Before the first one the device is kept busy, so that the host gets ahead as it is in training; a method that
waits for the device pays for it. Memory is a call's peak less what was there before and less the gradients it returns.

`--small` runs everything at tiny shapes, also without a GPU: there with plain torch and the host's clock, or, with
TRITON_INTERPRET=1, with the kernels interpreted. It shows that this file works and says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import LossConfig, linear_prefix_loss, prefix_loss

from ..files import write_json
from ..speed.clock import Clock
from ..speed.methods import (
    BF16,
    Linear,
    Logits,
    Result,
    Step,
    bare_products,
    chunked_products,
    copy_logits,
    liger,
    liger_from_logits,
    naive_from_logits,
    our_logps,
    ours,
    ours_from_logits,
    trl,
    trl_logps,
    with_gradient,
    without_gradient,
)

GIB = 2**30
# draws of random data whose errors are taken together: one loss alone can be right by luck
DRAWS = 8
Make = Callable[[], Step]


class Shapes(NamedTuple):
    """All that is measured on."""

    vocabulary: int
    width: int
    tokens: int  # from hidden states
    tokens_for_memory: int  # the same without rivals
    tokens_for_logps: int
    responses: int
    length: int  # logits [responses, length, vocabulary]
    few_rows: int
    many_rows: int  # more than 2^31 logits
    long_response: int
    long_width: int
    exact: tuple[int, int, int]  # tokens, width and vocabulary beside float64
    chunks: tuple[int, ...]
    rounds: int


FULL = Shapes(
    vocabulary=151_936,
    width=4096,
    tokens=32_768,
    tokens_for_memory=131_072,
    tokens_for_logps=8192,
    responses=8,
    length=1024,
    few_rows=16,
    many_rows=16_384,
    long_response=1_000_000,
    long_width=1024,
    exact=(256, 512, 32_000),
    chunks=(512, 1024, 2048, 4096),
    rounds=20,
)
SMALL = Shapes(
    vocabulary=1000,
    width=64,
    tokens=256,
    tokens_for_memory=512,
    tokens_for_logps=64,
    responses=4,
    length=8,
    few_rows=2,
    many_rows=16,
    long_response=1000,
    long_width=32,
    exact=(32, 32, 500),
    chunks=(64, 128),
    rounds=2,
)


class Target(NamedTuple):
    """At most `most` of `quantity`: ours over the base's, or ours alone."""

    what: str
    case: str
    ours: str
    base: str | None
    most: float
    quantity: str = "seconds"


RIVALS = ("TRL", "Liger", "naive")
SPARSE, BOUNDED = "ours, 40 % learn", "ours, 40 % learn, count given"
TARGETS = (
    Target("from hidden states / three bare products", "hidden", "ours", "three products", 1.15),
    Target("from hidden states / TRL", "hidden", "ours", "TRL", 0.75),
    Target("from hidden states / Liger", "hidden", "ours", "Liger", 1.0),
    Target("from hidden states, 40 % learn / all learn", "hidden", SPARSE, "ours", 0.45),
    Target("the same, their count given", "hidden", BOUNDED, "ours", 0.45),
    Target("from hidden states, extra memory", "hidden", "ours", None, 2 * GIB, "extra_bytes"),
    Target("the same, 4 x the tokens", "memory", "ours", None, 2 * GIB, "extra_bytes"),
    # 80 % of the copy's bandwidth: both move 4 bytes a logit
    Target("from logits in place / copying them", "logits", "ours in place", "copy", 1 / 0.8),
    Target("from logits / copying them", "logits", "ours", "copy", 1 / 0.8),
    Target("from logits in place / naive", "logits", "ours in place", "naive", 1 / 5),
    Target("from logits / naive", "logits", "ours", "naive", 1 / 5),
    Target("from logits in place / Liger in place", "logits", "ours in place", "Liger in place", 1 / 1.5),
    Target("from logits / Liger", "logits", "ours", "Liger", 1 / 1.5),
    Target("more than 2^31 logits: entries unlike those of two halves", "many", "ours", None, 0, "differing"),
    Target("bf16, error of the loss / float32 formula", "errors", "ours", "naive float32", 1.05, "loss"),
    Target("bf16, error of log-probs / float32 formula", "errors", "ours", "naive float32", 1.05, "logps"),
    Target("bf16, error of d hidden / float32 formula", "errors", "ours", "naive float32", 1.05, "d_hidden"),
    Target("bf16, error of d weight / float32 formula", "errors", "ours", "naive float32", 1.05, "d_weight"),
    Target("bf16, error of d hidden / bf16 logits upcast", "errors", "ours", "naive, bf16 logits", 1.05, "d_hidden"),
    Target("bf16, error of d weight / bf16 logits upcast", "errors", "ours", "naive, bf16 logits", 1.05, "d_weight"),
    Target("bf16, error of log-probs / TRL", "errors", "ours", "TRL", 0.5, "logps"),
    Target("entries that change from run to run", "errors", "ours", None, 0, "differing"),
)


# Measuring


def extra_bytes(step: Step) -> int:
    """The peak of one call above what was there before and above the gradients it leaves."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(map(gradient_bytes, step.leaves))


def gradient_bytes(leaf: Tensor) -> int:
    """What its gradient holds; nothing where it lies over the leaf itself."""
    grad = leaf.grad
    if grad is None or grad.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
        return 0
    return grad.numel() * grad.element_size()


def differing(a: Tensor, b: Tensor) -> int:
    """Entries whose bits differ."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.view(integer) != b.view(integer)).sum())


def device_times(step: Step, cuda: bool) -> dict[str, float]:
    """Microseconds of the kernels (without a device: of the operators) that take most of one call."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profile.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:12]
    return {name: round(times[name], 1) for name in largest}


class Bench:
    """Where to measure, on what and until when, and all that was measured.

    cases: by case its shape, notes, errors, and by method the figures or why there are none. times: every round's
    seconds, by case and method.
    """

    def __init__(self, device: torch.device, shapes: Shapes, seconds: float) -> None:
        self.device, self.shapes, self.deadline = device, shapes, time.monotonic() + seconds
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.backend = "triton" if device.type == "cuda" or interpreted else "torch"
        self.clock = Clock(device)
        self.cases: dict[str, dict[str, Any]] = {}
        self.times: dict[tuple[str, str], list[float]] = {}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, name: str) -> dict[str, Any]:
        return self.cases.setdefault(name, {"shape": {}, "notes": [], "errors": [], "methods": {}})

    def method(self, case: str, name: str) -> dict[str, Any]:
        """Its figures, to be read or added to."""
        figures: dict[str, Any] = self.case(case)["methods"].setdefault(name, {})
        return figures

    def linear(self, case: str, tokens: int) -> Linear:
        shape = (tokens, self.shapes.width, self.shapes.vocabulary)
        self.case(case)["shape"] = dict(zip(("tokens", "D", "V"), shape, strict=True))
        return Linear.random(self.device, shape, self.shapes.responses)

    def logits(self, case: str, responses: int, length: int) -> Logits:
        self.case(case)["shape"] = {"logits": [responses, length, self.shapes.vocabulary]}
        return Logits(self.device, responses, length, self.shapes.vocabulary)

    @contextmanager
    def guarded(self, case: str, name: str) -> Iterator[None]:
        """A method that fails, or that is not installed, says so in its place and stops nothing else."""
        try:
            yield
        except Exception as error:
            self.method(case, name)["error"] = described(error)
        else:
            return
        clean()

    def measure(self, case: str, methods: dict[str, Make], seconds: float = 25) -> None:
        """Times and memory of methods that take turns, for so many seconds at most."""
        steps: dict[str, Step] = {}
        for name, make in methods.items():
            figures = self.method(case, name)
            if self.left() <= 0:
                figures["error"] = "skipped: no time left"
                continue
            with self.guarded(case, name):
                step = make()
                step.start_again()
                loss = step()  # compiles, loads libraries and makes their buffers
                step.start_again()
                if self.clock.cuda:
                    figures["extra_bytes"] = extra_bytes(step)
                if loss is not None:
                    figures["loss"] = loss.item()
                step.start_again()
                steps[name] = step
        times: dict[str, list[float]] = {name: [] for name in steps}
        until = time.monotonic() + min(seconds, self.left())
        for turn in range(self.shapes.rounds):
            if turn >= 1 and time.monotonic() > until:
                break
            for name in list(steps)[:: -1 if turn % 2 else 1]:
                steps[name].start_again()
                times[name].append(self.clock(steps[name])[0])
                steps[name].start_again()
        for name, seconds_of in times.items():
            low, middle, high = torch.tensor(seconds_of).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            self.method(case, name).update(seconds=middle, p10=low, p90=high, rounds=len(seconds_of))
            self.times[case, name] = seconds_of

    def value(self, target: Target) -> float | None:
        """What the target speaks of, None where it was not measured."""
        if target.base is None:
            return self._figure(target, target.ours)
        if target.quantity == "seconds":
            mine, base = (self.times.get((target.case, name), []) for name in (target.ours, target.base))
            return statistics.median(map(over, mine, base)) if mine and base else None
        figures = self._figure(target, target.ours), self._figure(target, target.base)
        return None if None in figures else over(*figures)  # type: ignore[arg-type]

    def _figure(self, target: Target, name: str) -> float | None:
        figure: float | None = self.case(target.case)["methods"].get(name, {}).get(target.quantity)
        return figure

    def verdict(self, target: Target) -> dict[str, Any]:
        value = self.value(target)
        said = {"what": target.what, "quantity": target.quantity, "measured": value, "most": target.most}
        if value is None or self.shapes is SMALL:
            return {**said, "verdict": "not measured", "why": self._why_not(target)}
        return {**said, "verdict": "met" if value <= target.most else "not met"}

    def _why_not(self, target: Target) -> str:
        if self.shapes is SMALL:
            return "tiny shapes"
        case = self.case(target.case)
        names = [name for name in (target.ours, target.base) if name is not None]
        reasons = [f"{name}: {e}" for name in names if (e := case["methods"].get(name, {}).get("error"))]
        return "; ".join([*case["errors"], *reasons]) or "not asked for"


def over(mine: float, base: float) -> float:
    """mine / base; two figures of 0 are alike."""
    return mine / base if base else 1.0 if mine == 0 else math.inf


def described(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("trl", "liger_kernel"):
        return "not installed"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The rows


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


def kernels(bench: Bench) -> None:
    """Where our time goes: the kernels of one call, by their names. Late, since profiling slows later launches."""

    def profile(name: str, step: Step) -> None:
        with bench.guarded("kernels", name):
            step()
            step.start_again()
            bench.method("kernels", name)["device_microseconds"] = device_times(step, bench.clock.cuda)

    linear = bench.linear("kernels", bench.shapes.tokens)
    profile("ours, hidden", ours(linear, bench.backend))
    del linear
    logits = bench.logits("kernels", bench.shapes.responses, bench.shapes.length)
    profile("ours, logits in place", ours_from_logits(logits, bench.backend, inplace=True))
    few = Logits(bench.device, 1, bench.shapes.few_rows, bench.shapes.vocabulary)
    profile("ours, few rows", ours_from_logits(few, bench.backend, inplace=False))


def launches(bench: Bench) -> None:
    """Other block sizes than the table's, from logits in place."""
    if bench.backend != "triton":
        bench.case("launches")["errors"].append("skipped: nothing is launched without the Triton kernels")
        return
    data = bench.logits("launches", bench.shapes.responses, bench.shapes.length)
    step = ours_from_logits(data, bench.backend, inplace=True)
    methods: dict[str, Make] = {"as shipped": lambda: step}
    for num_warps, size in itertools.product((8, 16, 4, 32), (64, 32, 128)):
        name = f"{num_warps} warps, {size} bytes a thread"
        methods[name] = partial(with_launch, step, num_warps, size)
    bench.measure("launches", methods)
    note_fastest(bench, "launches")


def with_launch(step: Step, num_warps: int, bytes_a_thread: int) -> Step:
    from prefixloss._kernels import launch  # noqa: PLC0415 (needs triton)

    def chosen(vocabulary: int, *dtypes: torch.dtype, heavy: bool = False, aligned: bool = True) -> Any:
        return launch.launch_with(num_warps, bytes_a_thread, vocabulary, *dtypes)

    def forward() -> Result:
        shipped, launch.launch_for = launch.launch_for, chosen
        try:
            return step.forward()
        finally:
            launch.launch_for = shipped

    return replace(step, forward=forward)


def chunk_sizes(bench: Bench) -> None:
    """Other rows a chunk than the memory budget gives, from hidden states."""
    data = bench.linear("chunks", bench.shapes.tokens)
    methods: dict[str, Make] = {"as shipped": lambda: ours(data, bench.backend)}
    for size in bench.shapes.chunks:
        config = LossConfig(chunk_tokens=size)
        methods[f"{size} tokens a chunk"] = partial(ours, data, bench.backend, config=config)
    bench.measure("chunks", methods)
    note_fastest(bench, "chunks")


def note_fastest(bench: Bench, case: str) -> None:
    times = {name: figures["seconds"] for name, figures in bench.case(case)["methods"].items() if "seconds" in figures}
    if times:
        bench.case(case)["notes"].append(f"fastest: {min(times, key=lambda name: times[name])}")


CASES: dict[str, Callable[[Bench], None]] = {
    "errors": errors,
    "hidden": from_hidden,
    "logits": from_logits,
    "memory": more_tokens,
    "many": many_logits,
    "long": long_response,
    "logps": log_probs,
    "few": few_rows,
    "kernels": kernels,
    "launches": launches,
    "chunks": chunk_sizes,
}


def run(bench: Bench, only: list[str], save: Callable[[], None]) -> None:
    """Each row asked for, most important first; what is known is saved after each."""
    for name in (name for name in CASES if name in only):
        begun = time.monotonic()
        if bench.left() <= 0:
            bench.case(name)["errors"].append("skipped: no time left")
        else:
            try:
                CASES[name](bench)
            except Exception as error:  # the other rows are worth having
                bench.case(name)["errors"].append(f"stopped: {described(error)}")
            clean()
            bench.case(name)["took_seconds"] = round(time.monotonic() - begun, 1)
        show(name, bench.case(name))
        save()


# What is written


def show(name: str, case: dict[str, Any]) -> None:
    print(f"\n{name}: {case['shape']}")
    for method, figures in case["methods"].items():
        shown = [f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float)) and k not in TIME_FIGURES]
        if "seconds" in figures:
            middle, low, high = (1e3 * figures[k] for k in ("seconds", "p10", "p90"))
            shown.insert(0, f"{middle:.3f} ms ({low:.3f} to {high:.3f}, {figures['rounds']} rounds)")
        if "error" in figures:
            shown.append(figures["error"])
        print(f"  {method:30} {', '.join(shown)}")
    for line in (*case["notes"], *case["errors"]):
        print(f"  {line}")
    sys.stdout.flush()


TIME_FIGURES = ("seconds", "p10", "p90", "rounds")


def show_verdicts(verdicts: list[dict[str, Any]]) -> None:
    print("\ntargets")
    for v in verdicts:
        measured = v["why"] if v["measured"] is None else f"{v['measured']:.4g}"
        print(f"  {v['verdict']:12} {v['what']}: {measured} (at most {v['most']:.4g})")


def described_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no CUDA device: {platform.processor()}"
    return {"device": name, "driver": driver(), "versions": versions()}


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "transformers", "trl", "liger_kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def has_failed(case: dict[str, Any]) -> bool:
    """Whether ours raised an error, or the row did; a rival may, and time may run out."""
    ours_of = [figures.get("error", "") for name, figures in case["methods"].items() if not name.startswith(RIVALS)]
    return any(error and not error.startswith("skipped") for error in (*case["errors"], *ours_of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="these rows alone")
    parser.add_argument("--seconds", type=float, default=420, help="no row is begun later than this (default 420)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, whole after each row")
    parser.add_argument("--small", action="store_true", help="tiny shapes, without a GPU too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        sys.exit("bench.gpu: there is no CUDA device; --small runs tiny shapes without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, SMALL if arguments.small else FULL, arguments.seconds)
    machine = described_machine(device)
    print(machine, f"backend {bench.backend}", sep="\n", flush=True)

    def save() -> None:
        if arguments.json:
            setting = {"backend": bench.backend, "small": arguments.small, "dtype": "bfloat16"}
            verdicts = [bench.verdict(target) for target in TARGETS]
            write_json(arguments.json, {**machine, **setting, "targets": verdicts, "rows": bench.cases})

    run(bench, arguments.only, save)
    show_verdicts([bench.verdict(target) for target in TARGETS])
    if failed := [name for name, case in bench.cases.items() if has_failed(case)]:
        sys.exit(f"bench.gpu: failed in {', '.join(failed)}")
