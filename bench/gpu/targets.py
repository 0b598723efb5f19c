"""What the figures should be, and whether they are."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from .measure import Bench
from .shapes import GIB, SMALL


class Target(NamedTuple):
    """At most `most` of `quantity`: ours over the base's, or ours alone."""

    what: str
    case: str
    ours: str
    base: str | None
    most: float
    quantity: str = "seconds"


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


def value(bench: Bench, target: Target) -> float | None:
    """What the target speaks of, None where it was not measured."""
    if target.base is None:
        return _figure(bench, target, target.ours)
    if target.quantity == "seconds":
        mine, base = (bench.times.get((target.case, name), []) for name in (target.ours, target.base))
        return statistics.median(map(over, mine, base)) if mine and base else None
    mine_of, base_of = _figure(bench, target, target.ours), _figure(bench, target, target.base)
    return None if mine_of is None or base_of is None else over(mine_of, base_of)


def _figure(bench: Bench, target: Target, name: str) -> float | None:
    figure: float | None = bench.case(target.case)["methods"].get(name, {}).get(target.quantity)
    return figure


def verdict(bench: Bench, target: Target) -> dict[str, Any]:
    measured = value(bench, target)
    said = {"what": target.what, "quantity": target.quantity, "measured": measured, "most": target.most}
    if measured is None or bench.shapes is SMALL:
        return {**said, "verdict": "not measured", "why": _why_not(bench, target)}
    return {**said, "verdict": "met" if measured <= target.most else "not met"}


def _why_not(bench: Bench, target: Target) -> str:
    if bench.shapes is SMALL:
        return "tiny shapes"
    case = bench.case(target.case)
    names = [name for name in (target.ours, target.base) if name is not None]
    reasons = [f"{name}: {e}" for name in names if (e := case["methods"].get(name, {}).get("error"))]
    return "; ".join([*case["errors"], *reasons]) or "not asked for"


def over(mine: float, base: float) -> float:
    """mine / base; two figures of 0 are alike."""
    return mine / base if base else 1.0 if mine == 0 else math.inf
