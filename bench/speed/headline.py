"""A record in three lines: time where part of the tokens learn, memory at length, error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .harness import ratio
from .methods import OURS
from .record import Record

NAIVE = "naive"  # what the figures are beside: plain PyTorch


def headline(record: Record) -> str:
    """As Markdown; a line whose cases were not measured is left out."""
    lines = [*_time(_cases(record, "share")), *_memory(_cases(record, "length")), *_error(_cases(record, "models"))]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _cases(record: Record, group: str) -> list[dict[str, Any]]:
    """Of a group, those that both methods finished."""
    cases = [case for case in record["cases"] if case["group"] == group]
    return [case for case in cases if all(_row(case, name)["status"] == "ok" for name in (OURS, NAIVE))]


def _row(case: dict[str, Any], name: str) -> dict[str, Any]:
    return next((row for row in case["rows"] if row["method"] == name), {"status": "left out"})


def _time(cases: list[dict[str, Any]]) -> Iterator[str]:
    if cases:
        few, many = (at(cases, key=lambda case: case["learning_share"]) for at in (min, max))
        of = [ratio(case["rows"], OURS, NAIVE) for case in (few, many)]
        where = f"head {few['head']['name']}, {few['tokens']:,} tokens, {few['dtype']}"
        learning = [f"{case['learning_share']:.0%}" for case in (few, many)]
        shares = f"{of[0]:.2f} where {learning[0]} of the tokens learn, {of[1]:.2f} where {learning[1]} do"
        yield f"**Time** beside PyTorch's: {shares} ({where})"


def _memory(cases: list[dict[str, Any]]) -> Iterator[str]:
    measured = [case for case in cases if all(_row(case, name).get("peak_bytes") for name in (OURS, NAIVE))]
    if measured:
        longest = max(measured, key=lambda case: case["tokens"])
        mine, theirs = (_row(longest, name)["peak_bytes"] / 2**20 for name in (OURS, NAIVE))
        yield f"**Memory** above the inputs at {longest['tokens']:,} tokens: {mine:,.0f} MiB, PyTorch {theirs:,.0f}"


def _error(cases: list[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        mine, theirs = (_row(case, name).get("errors", {}) for name in (OURS, NAIVE))
        kinds = [kind for kind in ("logps", "d_hidden", "d_weight") if kind in mine and kind in theirs]
        if kinds:
            times = sorted(theirs[kind] / mine[kind] for kind in kinds)
            closer = f"{times[0]:.0f} to {times[-1]:.0f} times closer to float64 than PyTorch's"
            yield f"**Error**: log-probs and gradients are {closer} ({case['head']['name']}, {case['dtype']})"
            return
