"""Rows of the benchmark that look inside ours: its kernels by name, other launches, other chunks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prefixloss import LossConfig

from ..speed.from_hidden import ours
from ..speed.from_logits import ours_from_logits
from ..speed.inputs import Logits
from ..speed.step import Result, Step
from .measure import Bench, Make, device_times


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
