"""Breaks every kernel's machine code in one place after the other and says which breaks the emulator noticed.

A program of its own, since a process either interprets kernels or compiles them. It prints JSON: for each kernel and
kind of break how many there were, and those that nobody noticed. A break is noticed if the emulator raises or if any
output differs in a bit from that of the whole code; that the whole code is right is for other tests to say.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent))

import torch
from ptx_emulator import EmulationError, Emulator
from torch import Tensor

from prefixloss import LossConfig
from prefixloss._kernels import entries, problem, rows
from prefixloss._kernels.distill import Rows, launch_distill
from prefixloss._kernels.launch import Launch
from prefixloss._kernels.problem import Problem, Tokens
from prefixloss._kernels.scale import launch_scale
from prefixloss.backends.triton import distill, problems
from prefixloss.inputs.distillation import Teacher

COMPUTED, LEARNING = problem.COMPUTED.value, problem.LEARNING.value
# two warps, and blocks of 256 or 512 logits: whole ones and a rest in which every load has a thread with work. The last
# row ends where its memory ends
WARPS, LANES, VOCABULARY = 2, 64, 2 * 512 - 8
# elements of a row: a whole block of a product, and one of which every thread's elements but the first are outside
WIDTH = 1024 + 30


EMULATOR = Emulator()


# --- what runs


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem_of(config: LossConfig, logits: Tensor, ref: Tensor, grads: torch.dtype, **work: bool) -> Problem:
    """Five rows: nobody's, the first of all, whose own memory is fenced; one that learns; one whose gradient is 0; one
    that is only computed; and one that learns.
    """
    given = random(5, 5, seed=3)
    given[0, 2] = 0.0
    learning = COMPUTED | LEARNING
    tokens = Tokens(
        torch.tensor([10**12, 300, 1, 7, VOCABULARY - 1]),
        torch.tensor([0, learning, learning, COMPUTED, learning], dtype=torch.uint8),
        given,
        torch.arange(5),
    )
    # its logits are where its gradient is cleared
    EMULATOR.fenced = [tokens.ids_ptr[0], *(row[0] for row in given), *([] if ref is logits else [ref[0]])]
    problem = problems.problem_of(
        config, logits, ref, tokens, True, grads, terms=True, gradient=True, clear=True, **work
    )
    cut = Launch(LANES, 4 if grads.itemsize == 4 else 8, WARPS)
    return Problem(**{**problem.__dict__, "launch": cut})


EVERYTHING = LossConfig(
    kl="full", kl_coef=0.4, kl_importance=True, entropy_coef=0.2, softcap=6.0, temperature=1.4, sampler_correction="tis"
)


def whole_rows(vocabulary: int, indexed: bool) -> list[Tensor]:
    """Every option, in place."""
    logits, ref = random(5, vocabulary, seed=1), random(5, vocabulary, seed=2)
    logits[0], ref[0] = math.nan, math.nan
    problem = problem_of(EVERYTHING, logits, ref, torch.float32, indexed=indexed)
    stats, terms = torch.full((7, 5), 9.0), torch.full((6, 5), 9.0)
    rows.launch_rows(problem, stats, terms, logits, stats)
    return [logits, stats, terms]


def narrowed_rows() -> list[Tensor]:
    """Float16 gradients over their own float32 logits."""
    logits = random(5, VOCABULARY, seed=1)
    logits[0] = math.nan
    grads = logits.view(torch.float16)[:, VOCABULARY:]
    problem = problem_of(LossConfig(), logits, logits, torch.float16, narrowed=True, rescaled=True)
    stats, terms, scales = torch.full((7, 5), 9.0), torch.full((6, 5), 9.0), torch.full((5,), 9.0)
    rows.launch_rows(problem, stats, terms, grads, scales)
    return [logits, stats, terms, scales]


def sliced_rows() -> list[Tensor]:
    """Slices, combination, gradient."""
    logits, ref = random(5, VOCABULARY, seed=1), random(5, VOCABULARY, seed=2)
    logits[0], ref[0] = math.nan, math.nan
    problem = problem_of(EVERYTHING, logits, ref, torch.float32)
    # coefficients of nobody's row are 0; a -0 shows that nobody wrote another one
    stats, terms, sums = torch.full((7, 5), 9.0), torch.full((6, 5), -0.0), torch.full((6, 5, 2), 9.0)
    rows.launch_slices(problem, sums)
    rows.launch_combine(problem, sums, stats, terms)
    EMULATOR.fenced += [statistic[0] for statistic in stats]
    rows.launch_gradient(problem, stats, terms[3:], logits, stats, 2)
    return [logits, sums, stats, terms]


def distilled(listed: bool) -> list[Tensor]:
    """Rows of tokens 3, 1, 4 of five, of which the second has no gradient: beside a teacher's, in place; or beside a
    list, float16 gradients over their own float32 logits."""
    logits, teacher = random(5, VOCABULARY, seed=1), random(5, VOCABULARY, seed=2)
    tokens, values, given = torch.tensor([3, 1, 4]), torch.full((5,), 9.0), torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    EMULATOR.fenced = [logits[0], logits[2], *([] if listed else [teacher[0], teacher[2]])]
    options = LossConfig(softcap=6.0, temperature=1.4).encoded
    kind = distill._Kind("skew-reverse" if listed else "jsd", 0.3, options, options)
    grads = logits.view(torch.float16)[:, VOCABULARY:] if listed else logits
    made = distill._problem(
        kind, logits, None if listed else teacher, Rows(tokens, values, given), grads.dtype, gradient=True,
        narrowed=listed, rescaled=listed,
    )  # fmt: skip
    if listed:
        places = torch.zeros(5, 7, dtype=torch.int64)
        places[1] = torch.tensor([1, 255, 256, 511, 800, 801, -1])
        places[3] = torch.tensor([0, 255, 256, 511, 640, 900, VOCABULARY - 1])
        places[4] = torch.tensor([0, 5, 100, 200, 250, 251, 255])  # behind it the memory ends, in the first block
        said = Teacher(ids=places, logps=random(5, 7, seed=3).log_softmax(1) - 0.1)
        of_rows, count = distill._listed(said, tokens, VOCABULARY)
        made = replace(made, listed=of_rows, count=count)
    scales = torch.full((3,), 9.0)
    launch_distill(replace(made, launch=Launch(LANES, 4, WARPS)), grads, scales)
    return [logits, values, scales]


def chosen() -> list[Tensor]:
    """The large entries of three rows of five, of which the others are never read: one of sizes that differ by many
    powers, whose list has no room, and whose count says where the easy bound was; one with a few entries; and the last
    one, which nearly fills its list and its blocks."""
    logits, ref = random(5, VOCABULARY, seed=1), random(5, VOCABULARY, seed=2)
    logits[1], ref[1] = 42 * torch.rand(2, VOCABULARY, generator=torch.Generator().manual_seed(6))
    logits[2, ::100] += 9.0
    logits[4, ::8] += 7.0
    problem = problem_of(LossConfig(kl="full", kl_coef=0.4, entropy_coef=0.2), logits, ref, torch.float32)
    stats, terms = torch.full((7, 5), 9.0), torch.full((6, 5), -0.0)
    rows.launch_rows(replace(problem, work=problem.work._replace(gradient=False)), stats, terms, logits, stats)
    EMULATOR.fenced += [logits[0], *(statistic[0] for statistic in stats)]
    sizes, sums, counts = torch.full((2, 5), 9.0), torch.full((3, 5), 9.0), torch.full((5,), 9, dtype=torch.int32)
    columns, values = torch.full((5, 128), 9, dtype=torch.int32), random(5, 128, seed=4)
    entries.launch_measure(problem, stats, terms[3:], sizes)
    entries.launch_select(problem, stats, terms[3:], torch.tensor(1.8e-5), columns, values, counts, sums)
    return [sizes, columns, values, counts, sums]


def apart(rows: int, width: int, seed: int) -> Tensor:
    """Rows of a matrix, behind each of which is what nobody may touch."""
    whole = random(rows, width + 300, seed=seed)
    EMULATOR.fenced += [row[width:] for row in whole]
    return whole[:, :width]


def multiplied() -> list[Tensor]:
    """Lists of four rows, of which one has no room, times a head; and their entries by column, times hidden states."""
    EMULATOR.fenced = []
    columns = torch.tensor([[1, 2, 4], [0, 0, 0], [3, 4, 0], [0, 2, 4]], dtype=torch.int32)
    counts, values = torch.tensor([3, 4, 2, 3], dtype=torch.int32), random(4, 3, seed=1)
    out = torch.full((4, WIDTH), 9.0)
    entries.launch_gather(columns, values, counts, apart(5, WIDTH, seed=2), out)
    order, ends = torch.tensor([1, 3, 4, 4, 4], dtype=torch.int32), torch.tensor([1, 2, 5, 5, 5])
    total = apart(5, WIDTH, seed=3)
    entries.launch_scatter(
        order, ends, torch.tensor([0, 2, 0, 3, 2]), random(5, seed=5), apart(4, WIDTH, seed=4), total
    )
    return [out, total]


def scaled() -> list[Tensor]:
    EMULATOR.fenced = []
    x = random(5000, seed=1).bfloat16()
    launch_scale(x, torch.tensor(1.7))
    return [x]


# of a kernel's barriers, those that the compiler's own stand beside in such a run: the tests of short lists need them
DOUBLED = {"select_kernel": 1}
RUNS: dict[str, tuple[Callable[[], list[Tensor]], tuple[str, ...]]] = {
    "whole rows": (lambda: whole_rows(VOCABULARY, indexed=True), ("row_kernel",)),
    "rows that start anywhere": (lambda: whole_rows(VOCABULARY + 1, indexed=False), ("row_kernel",)),
    "narrowed rows": (narrowed_rows, ("row_kernel",)),
    "slices": (sliced_rows, ("slice_kernel", "combine_kernel", "gradient_kernel")),
    "distillation": (lambda: distilled(listed=False), ("distill_kernel",)),
    "distillation from a list": (lambda: distilled(listed=True), ("distill_kernel",)),
    "entries": (chosen, ("measure_kernel", "select_kernel")),
    "products of entries": (multiplied, ("gather_kernel", "scatter_kernel")),
    "scale": (scaled, ("scale_kernel",)),
}


# --- what is broken


def without_barriers(line: str) -> str | None:
    return "" if re.match(r"\s*bar\.sync", line) else None


def without_mask(line: str) -> str | None:
    masked = re.match(r"(\s*)@!?%p\d+\s+((?:ld|st)\..*)", line)
    return masked and masked[1] + masked[2]


def with_address_shifted(line: str) -> str | None:
    """By its own width."""
    access = re.match(
        r"(.*\b(?:ld|st)\.(?:global|shared)\.(?:cs\.)?(?:v(\d)\.)?b(\d+).*\[\s*%\w+)\s*(?:\+\s*(-?\d+))?(\s*\].*)", line
    )
    if access is None:
        return None
    width = int(access[2] or 1) * int(access[3]) // 8
    return f"{access[1]} + {int(access[4] or 0) + width}{access[5]}"


BREAKS: dict[str, Callable[[str], str | None]] = {
    "barrier removed": without_barriers,
    "mask dropped": without_mask,
    "address shifted": with_address_shifted,
}


def mutants(ptx: str) -> Iterator[tuple[str, str, str]]:
    """Kind of break, the line it broke, and the code with it."""
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        for kind, broken in BREAKS.items():
            changed = broken(line)
            if changed is not None:
                yield kind, " ".join(line.split()), "\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n"


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True))


def noticed(run: Callable[[], list[Tensor]], wanted: list[Tensor]) -> str | None:
    """How the break of this run was noticed, if at all."""
    try:
        return None if same(run(), wanted) else "wrong result"
    except EmulationError as error:
        return type(error).__name__


def broken_one_by_one() -> list[dict[str, Any]]:
    code: dict[str, str] = {}

    def seen(name: str, ptx: str) -> str:
        return code.setdefault(name, ptx)

    EMULATOR.install()
    found = []
    for title, (run, kernels) in RUNS.items():
        code.clear()
        EMULATOR.changed = seen
        wanted = run()
        whole = dict(code)
        for kernel in kernels:
            result: dict[str, Any] = {
                "run": title,
                "kernel": kernel,
                "made": Counter(),
                "noticed": Counter(),
                "missed": [],
                "doubled": DOUBLED.get(kernel, 0),
            }
            for kind, line, ptx in mutants(whole[kernel]):
                EMULATOR.changed = lambda name, text, kernel=kernel, ptx=ptx: ptx if name == kernel else text
                result["made"][kind] += 1
                by = noticed(run, wanted)
                if by is None:
                    result["missed"].append([kind, line])
                else:
                    result["noticed"][by] += 1
            found.append(result)
    return found


if __name__ == "__main__":
    print(json.dumps(broken_one_by_one()))
