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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from .exact import errors, many_logits
from .fast import few_rows, from_hidden, from_logits, log_probs, long_response, more_tokens
from .machine import described_machine
from .measure import Bench, clean, described
from .shapes import FULL, SMALL
from .targets import TARGETS, verdict
from .tuning import chunk_sizes, kernels, launches

RIVALS = ("TRL", "Liger", "naive")
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
            verdicts = [verdict(bench, target) for target in TARGETS]
            write_json(arguments.json, {**machine, **setting, "targets": verdicts, "rows": bench.cases})

    run(bench, arguments.only, save)
    show_verdicts([verdict(bench, target) for target in TARGETS])
    if failed := [name for name, case in bench.cases.items() if has_failed(case)]:
        sys.exit(f"bench.gpu: failed in {', '.join(failed)}")
