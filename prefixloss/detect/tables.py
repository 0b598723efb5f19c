"""What `prefixloss detect eval` shows: shares, confusion, several sources and detectors side by side, reliability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixloss.detect.evaluate import KINDS, Scores, kind_of
from prefixloss.detect.records import Record
from prefixloss.io.files import write_whole
from prefixloss.io.visible import visible

_SHOWN_ERRORS = 5  # of each kind
_BAR = 20  # characters


class Row(NamedTuple):
    """What one detector scores on one source."""

    source: str
    detector: str
    scores: Scores


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _share(kind: str, scores: Scores) -> str:
    return _percent(scores.share(kind))


def _f1(f1: float | None) -> str:
    return "-" if f1 is None else f"{100 * f1:.1f}"


def _per_response(total: float, scores: Scores) -> str:
    return f"{total / len(scores.labels):,.3g}"


# in the order of the tables
_FIGURES: dict[str, Callable[[Scores], str]] = {
    "responses": lambda s: str(len(s.labels)),
    **{kind: partial(_share, kind) for kind in KINDS},
    "nothing to say": lambda s: _percent(s.unsure / len(s.labels)),
    "exact, of those with an error": lambda s: _percent(s.share_among("exact", correct=False)),
    "false alarms, of those without": lambda s: _percent(s.share_among("false alarm", correct=True)),
    "ProcessBench F1": lambda s: _f1(s.f1),
    "steps/s": lambda s: f"{s.steps / max(s.seconds, 1e-9):,.0f}",
    "seconds a response": lambda s: _per_response(s.seconds, s),
    "calls a response": lambda s: _per_response(s.cost.calls, s),
    "tokens a response": lambda s: _per_response(s.cost.tokens, s),
}


def shares(row: Row) -> Table:
    """One detector on one source, a figure a line."""
    title = Text(visible(f"{row.source}, detector {row.detector}"))
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, figure in _FIGURES.items():
        if row.scores.cost.calls or not label.startswith(("calls", "tokens")):
            table.add_row(label, figure(row.scores))
    return table


def side_by_side(rows: Sequence[Row]) -> Table:
    """A figure a line, and a column for each detector on each source."""
    table = Table(title="shares of all responses", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(Text(visible(f"{row.source}\n{row.detector}")), justify="right")
    for label, figure in _FIGURES.items():
        table.add_row(label, *(figure(row.scores) for row in rows))
    return table


def confusion(scores: Scores) -> Table:
    counts = scores.confusion()
    names = ["none", *(str(step) for step in range(1, len(counts) - 1)), f"{len(counts) - 1}+"]
    table = Table(title="first wrong step: labelled (down) and found (across)", title_justify="left")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for number, name in enumerate(names):
        cells = [f"[bold]{n}[/bold]" if n and number == k else str(n or "") for k, n in enumerate(counts[number])]
        table.add_row(name, *cells)
    return table


def reliability(detector: str, scores: Scores) -> Table:
    """How often finds are right, by confidence: right ones are a bar of blocks, the mean confidence a mark on it."""
    error = scores.calibration_error()
    title = f"finds of {detector} by confidence" + ("" if error is None else f", calibration error {error:.3f}")
    table = Table(title=Text(visible(title)), title_justify="left")
    for name in ("confidence", "finds", "right", "mean confidence", "F1 from here up"):
        table.add_column(name, justify="right")
    table.add_column("right \u2588, confidence \u2502")
    for b in scores.reliability():
        share = b.right / b.verdicts
        cells = ["\u2588" if k < round(share * _BAR) else "\u00b7" for k in range(_BAR + 1)]
        cells[round(b.confidence * _BAR)] = "\u2502"
        span = f"{b.low:.1f} to {b.high:.1f}"
        table.add_row(span, str(b.verdicts), _percent(share), f"{b.confidence:.2f}", _f1(b.f1), "".join(cells))
    return table


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The same as a picture, PNG: a line a detector, and the diagonal of a confidence that means what it says.
    ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curve, counts = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for row in rows:
        bins = row.scores.reliability()
        means = [b.confidence for b in bins]
        curve.plot(means, [b.right / b.verdicts for b in bins], marker="o", label=f"{row.detector}, {row.source}")
        counts.plot(means, [b.verdicts for b in bins], marker="o")
    curve.set(title="share of finds that are right", xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    counts.set(title="finds", xlim=(0, 1), ylim=(0, None), xlabel="confidence")
    curve.legend(loc="upper left", fontsize="small")
    for axes in (curve, counts):
        axes.grid(alpha=0.3)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def show_errors(console: Console, records: Sequence[Record], scores: Scores) -> None:
    """Some responses of each kind of error."""
    results = [result.at_least(scores.threshold) for result in scores.found]
    told = list(enumerate(zip(records, scores.labels, results, strict=True), 1))
    for kind in KINDS[1:]:
        wrong = [one for one in told if kind_of(one[1][1], one[1][2].step) == kind]
        for number, (record, label, result) in wrong[:_SHOWN_ERRORS]:
            head = f"{kind}, response {number}: labelled {_name(label)}, found {_name(result.step)}: {result.reason}"
            console.print(Text(visible(head)))
            if result.step is not None:
                console.print(Text(visible(f"    {record.steps[result.step].strip()[:300]}")))


def _name(step: int | None) -> str:
    return "none" if step is None or step < 0 else f"step {step + 1}"
