"""How a call is measured: methods in turns, the device's own time, memory at its peak, bits that differ."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..speed.clock import Clock
from ..speed.inputs import Linear, Logits
from ..speed.step import Step
from .shapes import Shapes

Make = Callable[[], Step]


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


def described(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("trl", "liger_kernel"):
        return "not installed"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
