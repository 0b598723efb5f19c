"""The command's own cases under pytest-benchmark, to find out later what became slower: `make bench-track`.

One process for all, so that a figure is comparable with the same figure of an earlier run and with no other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case, default_cases, methods_for, quick_cases
from .harness import missing, refusal
from .methods import METHODS
from .settings import credit_of, setting_of
from .worker import full_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases() -> list[Any]:
    """Every case and method, named for `-k`: "floor and wide and ours"."""
    every = [("quick", case) for case in quick_cases()] + [(case.group, case) for case in default_cases(DEVICE)]
    found = []
    for group, case in every:
        for name in methods_for(case, quick=True):
            words = (group, case.head.name, str(case.tokens), case.dtype, case.setting, case.start, name)
            found.append(pytest.param(case, name, id="-".join(words)))
    return found


@pytest.mark.parametrize(("case", "name"), cases())
def test_speed(benchmark: Any, case: Case, name: str) -> None:
    method = METHODS[case.start][name]
    why = missing(method) or refusal(method, case, credit_of(case.tokens, setting_of(case.setting)), DEVICE)
    if why:
        pytest.skip(why)
    step = method.make(full_inputs(case, torch.device(DEVICE)))

    def call() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(case=case.as_json(), method=name)
    benchmark.pedantic(call, setup=step.start_again, warmup_rounds=1, rounds=5)
