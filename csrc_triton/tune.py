"""Opt-in: with PREFIXLOSS_AUTOTUNE=1 a few launches are timed for each kind of problem, once a process.

Without it the table in `launch` decides, and a first call costs one compilation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import triton

from . import launch, rows
from .problem import COMPUTED, LEARNING, Problem, Tokens

_BEST: dict[object, launch.Launch] = {}
# rows to time: enough to fill a device several times over
_ROWS = 512
# elements of any dtype that are whole vectors
_ALIGNED = 16
# threads a program may have on any device: 32 warps of 32, 16 of AMD's 64
_MOST_THREADS = 1024


def wanted() -> bool:
    return os.environ.get("PREFIXLOSS_AUTOTUNE") == "1"


def best_launch(
    problem: Problem, grads: torch.dtype, timer: Callable[[Callable[[], None]], float] | None = None
) -> launch.Launch:
    """The fastest launch for problems like this one; timer: a function's milliseconds."""
    dtypes = (problem.logits.dtype, problem.ref.dtype, grads)
    key = (problem.logits.device, problem.vocabulary, dtypes, problem.work, problem.kind)
    if key not in _BEST:
        timer = timer or triton.testing.do_bench
        trial = _trial(problem)
        run = _runner(trial, _matrix(problem, grads))
        with launch.current(problem.logits.device):  # the timer's events and its own buffer belong there too
            tried = choices(problem.vocabulary, dtypes, launch.warp_size())
            times = {choice: timer(partial(run, replace(trial, launch=choice))) for choice in tried}
        _BEST[key] = min(times, key=lambda choice: times[choice])
    return _BEST[key]


def choices(vocabulary: int, dtypes: Sequence[torch.dtype], lanes_a_warp: int) -> list[launch.Launch]:
    """The launches to time: none has more threads than a program may have."""
    return sorted(
        {
            launch.launch_with(num_warps, bytes_a_thread, vocabulary, *dtypes)
            for num_warps in (4, 8, 16, 32)
            for bytes_a_thread in (32, 64, 128)
            if num_warps * lanes_a_warp <= _MOST_THREADS
        }
    )


def _trial(problem: Problem) -> Problem:
    """The same kind of problem on random logits, each row a token that learns."""
    device = problem.logits.device
    tokens = Tokens(
        torch.randint(problem.vocabulary, (_ROWS,), device=device),
        torch.full((_ROWS,), COMPUTED.value | LEARNING.value, dtype=torch.uint8, device=device),
        torch.rand(5, _ROWS, device=device),
        torch.arange(_ROWS, device=device),
    )
    logits, ref = (_matrix(problem, x.dtype) for x in (problem.logits, problem.ref))
    return replace(problem, logits=logits, ref=ref, tokens=tokens, work=problem.work._replace(narrowed=False))


def _matrix(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """Random, [_ROWS, V], with rows that start at whole vectors, or anywhere, as the problem's do."""
    width = -(-problem.vocabulary // _ALIGNED) * _ALIGNED if problem.work.aligned else problem.vocabulary
    return torch.randn(_ROWS, width, device=problem.logits.device).to(dtype)[:, : problem.vocabulary]


def _runner(trial: Problem, grads: torch.Tensor) -> Callable[[Problem], None]:
    stats, terms = trial.tokens.given_ptr.new_ones(7, _ROWS), trial.tokens.given_ptr.new_ones(6, _ROWS)
    if trial.work.gradient and not trial.work.terms:
        return lambda problem: rows.launch_gradient(problem, stats, terms[3:], grads, stats, 1)
    return lambda problem: rows.launch_rows(problem, stats, terms, grads, stats)
