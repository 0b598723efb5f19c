"""What Triton would compile, and the code it makes, on a machine without a device.

A program of its own, since a process either interprets kernels or compiles them. It prints "variants", "offsets",
"devices" and "tuned" as JSON: what the functions below return.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prefixloss import LossConfig, config
from prefixloss._kernels import distill as distill_kernels
from prefixloss._kernels import launch, problem, rows, scale, tune
from prefixloss._kernels.problem import Problem, Tokens
from prefixloss.backends.triton import distill, from_head, from_logits, problems
from prefixloss.inputs.distillation import Teacher

COMPUTED, LEARNING = problem.COMPUTED.value, problem.LEARNING.value


class Driver:
    """As much of a device's driver as the compiler asks for. asked: what it was told when it asked for the device."""

    target = GPUTarget("cuda", 90, 32)
    current = 0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        self.asked.append(self.current)
        return self.current

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def loss_of_logits(
    batch: int = 40, length: int = 8, vocabulary: int = 4096, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """The operator on padded logits, on policy, every token learning."""
    count = batch * length
    logits = torch.zeros(batch, length, vocabulary, dtype=dtype)
    ids, flags = torch.zeros(count, dtype=torch.int64), torch.full((count,), COMPUTED | LEARNING, dtype=torch.uint8)
    config = LossConfig(**options)
    from_logits.logit_loss(logits, None, ids, flags, torch.ones(5, count), False, config.encoded, True)


def loss_of_head(tokens: int = 320, vocabulary: int = 4096, **options: Any) -> None:
    """The operator on hidden states, with every gradient."""
    hidden, weight, ids = torch.zeros(tokens, 8), torch.zeros(vocabulary, 8), torch.zeros(tokens, dtype=torch.int64)
    flags = torch.full((tokens,), COMPUTED | LEARNING, dtype=torch.uint8)
    none, encoded = (None, None, None, None), LossConfig(**options).encoded
    given = torch.ones(5, tokens)
    from_head.linear_loss(hidden, weight, *none, ids, flags, given, [False] * 3, encoded, tokens, [True, True, False])


def distilled(
    tokens: int = 320, vocabulary: int = 4096, ids: int = 0, name: str = "jsd", beta: float = 0.5,
    temperature: float = 1.0,
) -> None:  # fmt: skip
    """The operator on hidden states, with every gradient; a teacher that lists so many ids, or has a head."""
    hidden, weight = torch.zeros(tokens, 8), torch.zeros(vocabulary, 8)
    teacher = Teacher(hidden, weight)
    if ids:
        listed = torch.arange(ids).expand(tokens, ids)
        teacher = Teacher(ids=listed, logps=torch.full((tokens, ids), -9.0))
    wanted, config = torch.ones(tokens, dtype=torch.bool), LossConfig(temperature=temperature).encoded
    kind = (name, beta, config, config)
    distill.linear_distillation(hidden, weight, None, *teacher, wanted, torch.ones(tokens), *kind, [True, True, False])


def variants() -> dict[str, list[str]]:
    """The kernels that each call compiles beyond those that the calls before it did; nothing runs."""
    seen: set[Any] = set()
    new: list[str] = []

    def asked(key: Any, fn: Any, **_: Any) -> bool:
        if (fn.name, key) not in seen:
            seen.add((fn.name, key))
            new.append(fn.name.rpartition(".")[2])
        return True  # do not compile

    triton.knobs.runtime.jit_cache_hook = asked
    # 128 multiprocessors are assumed: 320 rows are not split
    calls: dict[str, Callable[[], None]] = {
        "first": loss_of_logits,
        "more tokens": lambda: loss_of_logits(batch=64),
        "another length": lambda: loss_of_logits(length=9),
        "another shape": lambda: loss_of_logits(batch=23, length=33),
        "another temperature": lambda: loss_of_logits(temperature=0.7),
        "other coefficients": lambda: loss_of_logits(clip_low=0.1, clip_high=0.3),
        "entropy": lambda: loss_of_logits(entropy_coef=0.1),
        "another entropy coefficient": lambda: loss_of_logits(entropy_coef=0.3, temperature=1.3),
        "softcap": lambda: loss_of_logits(softcap=30.0, logit_scale=0.5),
        "another softcap": lambda: loss_of_logits(softcap=50.0, logit_scale=0.7),
        "a whole softcap": lambda: loss_of_logits(softcap=20, logit_scale=2),
        "another whole softcap": lambda: loss_of_logits(softcap=32, logit_scale=1),
        "another objective": lambda: loss_of_logits(objective="sapo"),
        "another dtype": lambda: loss_of_logits(dtype=torch.bfloat16),
        "an odd vocabulary": lambda: loss_of_logits(vocabulary=4097, length=9),
        "another length of an odd vocabulary": lambda: loss_of_logits(vocabulary=4097, length=10),
        "a longer odd vocabulary": lambda: loss_of_logits(vocabulary=4097, length=16),
        "head": loss_of_head,
        "head of more tokens": lambda: loss_of_head(tokens=515),
        "head in other chunks": lambda: loss_of_head(tokens=1024, chunk_tokens=512),
        "few rows": lambda: loss_of_logits(batch=2, length=32),
        "as few rows": lambda: loss_of_logits(batch=2, length=28),
        "other few rows": lambda: loss_of_logits(batch=2, length=31),
        "distillation": distilled,
        "distillation of more tokens": lambda: distilled(tokens=515),
        "another beta": lambda: distilled(beta=0.3, temperature=0.7),
        "another divergence": lambda: distilled(name="reverse"),
        "a list": lambda: distilled(ids=20),
        "another list": lambda: distilled(ids=17, tokens=330),
        "a list of one": lambda: distilled(ids=1),
        "a longer list": lambda: distilled(ids=100),
    }
    result = {}
    for name, call in calls.items():
        new.clear()
        call()
        result[name] = sorted(new)
    triton.knobs.runtime.jit_cache_hook = None
    return result


class Current:
    """In place of torch.cuda.device and torch.xpu.device: makes the mock driver's device the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before, Driver.current = Driver.current, self.device.index

    def __exit__(self, *_: object) -> None:
        Driver.current = self.before


def problem_on(device: torch.device | None = None, vocabulary: int = 4096) -> Problem:
    """Four rows of logits that say they are on `device`."""
    count, logits = 4, torch.zeros(4, vocabulary)
    if device is not None:
        logits = logits.as_subclass(type("Elsewhere", (torch.Tensor,), {"device": device}))
    ids, flags = torch.zeros(count, dtype=torch.int64), torch.full((count,), COMPUTED | LEARNING, dtype=torch.uint8)
    tokens = Tokens(ids, flags, torch.ones(5, count), ids)
    return problems.problem_of(LossConfig(), logits, None, tokens, False, logits.dtype, terms=True, gradient=True)


def distillation_on(problem: Problem) -> distill_kernels.DistillProblem:
    """The same logits beside themselves."""
    rows_of = distill_kernels.Rows(torch.arange(4), torch.zeros(4), torch.ones(4))
    kind = distill._Kind("reverse", 0.5, LossConfig().encoded, LossConfig().encoded)
    made = distill._problem(kind, torch.zeros(4, 4096), torch.zeros(4, 4096), rows_of, torch.float32, gradient=True)
    return dataclasses.replace(made, logits=problem.logits, teacher=problem.logits)


def launches(problem: Problem) -> dict[str, Callable[[], None]]:
    """Every launcher, by its name."""
    stats, terms, sums, grads = torch.zeros(7, 4), torch.zeros(6, 4), torch.zeros(6, 4, 2), torch.zeros(4, 4096)
    return {
        "launch_rows": lambda: rows.launch_rows(problem, stats, terms, grads, stats),
        "launch_slices": lambda: rows.launch_slices(problem, sums),
        "launch_combine": lambda: rows.launch_combine(problem, sums, stats, terms),
        "launch_gradient": lambda: rows.launch_gradient(problem, stats, terms[3:], grads, stats, 2),
        "launch_distill": lambda: distill_kernels.launch_distill(distillation_on(problem), grads, stats),
        "launch_scale": lambda: scale.launch_scale(problem.logits, torch.ones(())),
    }


def devices() -> dict[str, dict[str, list[int]]]:
    """For logits on cuda:1, xpu:1 and the CPU, while device 0 is current: where each launcher's kernel runs, and which
    device is current after them all."""
    triton.knobs.runtime.jit_cache_hook = lambda **_: True  # do not compile
    torch.cuda.device = torch.xpu.device = Current
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    result: dict[str, dict[str, list[int]]] = {}
    for name in ("cuda:1", "xpu:1", "cpu"):
        result[name] = {}
        for launcher, run in launches(problem_on(torch.device(name))).items():
            driver.active.asked.clear()
            run()
            result[name][launcher] = sorted(set(driver.active.asked))
        result[name]["after"] = [Driver.current]
    triton.knobs.runtime.jit_cache_hook = None
    return result


def tuned() -> dict[str, list[int]]:
    """The threads of every launch that autotuning tries, for each target."""
    triton.knobs.runtime.jit_cache_hook = lambda **_: True  # do not compile
    tune._ROWS = 2
    targets = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
    result: dict[str, list[int]] = {}
    for name, target in targets.items():
        Driver.target = target
        tune._BEST.clear()
        tried: list[int] = []

        def timer(run: Any, tried: list[int] = tried, lanes: int = target.warp_size) -> float:
            (problem,) = run.args
            tried.append(problem.launch.num_warps * lanes)
            return 1.0

        tune.best_launch(problem_on(vocabulary=2**17), torch.float32, timer)
        result[name] = sorted(set(tried))
    triton.knobs.runtime.jit_cache_hook = None
    return result


def row_offsets() -> dict[str, list[str]]:
    """For each kernel the types of the offsets that are added to its pointer arguments, and of the products in them."""
    code: dict[str, str] = {}
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        code[self.__name__] = kernel.asm["ttir"]
        return kernel

    JITFunction.run = compiled
    loss_of_logits()
    loss_of_logits(batch=2)
    distilled(ids=20)
    return {name: offset_types(text) for name, text in code.items()}


def refusals() -> dict[str, str]:
    """What compiling says to a name that the options allow and no kernel knows, by option."""
    driver.set_active(Driver())
    run, messages = JITFunction.run, {}
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    for option in ("objective", "sampler_correction", "kl"):
        config._RULES[option] = (lambda _: True, "any")
        try:
            loss_of_logits(**{option: "brand-new"})
        except triton.CompilationError as error:
            inner: BaseException = error
            while inner.__cause__ is not None:
                inner = inner.__cause__
            messages[option] = str(inner)
    return messages


def offset_types(text: str) -> list[str]:
    """The types in Triton's own IR of every offset added to a pointer argument, and of every product it is made of."""
    signature = next(line for line in text.splitlines() if "tt.func" in line)
    arguments = set(re.findall(r"(%[\w.]+): !tt\.ptr", signature))
    made = {m[1]: m[2] for m in re.finditer(r"^\s*(%[\w.#:]+) = (.*)$", text, re.MULTILINE)}
    types: list[str] = []
    for base, offset, kind in re.findall(r"tt\.addptr (%[\w.]+), (%[\w.]+) : !tt\.ptr<\w+>, (\w+)", text):
        if base in arguments:
            types.append(kind)
            pending = [offset]
            while pending:
                made_by = made.pop(pending.pop(), "")
                if made_by.startswith("arith.muli"):
                    types.append(re.search(r": (\w+)", made_by)[1])
                pending += re.findall(r"%[\w.]+", made_by)
    return types


if __name__ == "__main__":
    driver.set_active(Driver())
    launch.processors.cache_clear()
    # the offsets last: they leave Triton's launcher changed
    results = {"variants": variants(), "devices": devices(), "tuned": tuned(), "offsets": row_offsets()}
    print(json.dumps(results))
