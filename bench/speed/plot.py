"""A record as pictures for a README: 800 pixels wide at half their resolution, safe for the colour-blind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from prefixloss.io.files import write_whole

from .harness import ratio
from .methods import FLOOR, OURS
from .record import Record, machine_line
from .table import ERRORS

WIDTH, DPI = 8.0, 200
# Okabe and Ito's colours, and a marker each for those who see none
LOOKS = {
    FLOOR: ("#000000", "_"), "new-copy": ("#000000", "|"), OURS: ("#D55E00", "o"), "ours-inplace": ("#D55E00", "D"),
    "naive": ("#0072B2", "s"), "picked": ("#56B4E9", "^"), "compiled": ("#009E73", "v"),
    "torch": ("#CC79A7", "P"), "trl": ("#E69F00", "X"), "liger": ("#7F7F7F", "d"), "liger-inplace": ("#7F7F7F", "*"),
    "cce": ("#8C6D1F", "<"),
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white",
    "axes.titlesize": 10,
}  # fmt: skip
Case = dict[str, Any]
Row = dict[str, Any]


def draw(record: Record, out: Path) -> list[Path]:
    """Writes the pictures that the record has figures for, and says which."""
    pictures = {"length": length, "share": share, "errors": errors, "floor": floor}
    written = []
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(record)
            if figure is not None:
                path = out / f"{name}.png"
                _save(figure, path)
                written.append(path)
    return written


def _save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
    plt.close(figure)


# The pictures


def length(record: Record) -> Figure | None:
    """Time and memory against the number of tokens."""
    cases = _largest(record, "length", lambda c: (_shape(c), c["setting"]), lambda c: c["tokens"])
    if not cases:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.4))
    one = cases[0]
    _title(figure, record, f"Time and memory against length: {_shape(one)}, {one['setting']}")
    for ax, value, label in (
        (axes[0], _milliseconds, "time, forward and backward, ms"),
        (axes[1], _mebibytes, "peak memory, MiB"),
    ):
        _lines(ax, cases, lambda c: c["tokens"], value)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        ticks = [case["tokens"] for case in cases]
        ax.set_xticks(ticks, [_tokens(n) for n in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    axes[1].set_title("above the inputs, gradients included", loc="left", color="#555555", fontsize=9)
    _legend(figure, cases)
    return figure


def share(record: Record) -> Figure | None:
    """Time against the share of tokens that learn, and the line on which only they cost."""
    cases = _largest(record, "share", lambda c: (_shape(c), c["tokens"]), lambda c: c["learning_share"])
    if not cases:
        return None
    figure, ax = plt.subplots(figsize=(WIDTH, 4.6))
    one = cases[-1]
    _title(figure, record, f"Time against the learning share: {_shape(one)}, {_tokens(one['tokens'])} tokens")
    _lines(ax, cases, lambda c: c["learning_share"], _milliseconds)
    ideal: list[Line2D] = []
    for row in _ok(one):
        if row["method"] == OURS:
            full = _milliseconds(row) / one["learning_share"]
            ideal = ax.plot([0, 1], [0, full], ":", color=LOOKS[OURS][0], linewidth=1.3, label="ideal: in proportion")
    ax.set(xlabel="tokens that learn", ylabel="time, forward and backward, ms", xlim=(0, 1.03), ylim=(0, None))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    _legend(figure, cases, tuple(ideal))
    return figure


def errors(record: Record) -> Figure | None:
    """Relative errors of each method, a panel a data type."""
    measured = [c for c in record["cases"] if c["start"] == "hidden" and any("errors" in row for row in c["rows"])]
    if not measured:
        return None
    by_head: dict[str, list[Case]] = defaultdict(list)
    for case in measured:
        by_head[case["head"]["name"]].append(case)
    cases = max(by_head.values(), key=lambda cases: (len(cases), cases[0]["head"]["width"]))
    kinds = {"logps": ("o", "#0072B2"), "d_hidden": ("s", "#E69F00"), "d_weight": ("^", "#009E73")}
    labels = list(dict.fromkeys(row["label"] for case in cases for row in case["rows"] if "errors" in row))[::-1]
    figure, axes = plt.subplots(1, len(cases), figsize=(WIDTH, 1.6 + 0.3 * len(labels)), sharey=True, squeeze=False)
    head = cases[0]["head"]
    _title(figure, record, f"Relative error against float64: D {head['width']:,}, V {head['vocabulary']:,}")
    for ax, case in zip(axes[0], cases, strict=True):
        for row in case["rows"]:
            for kind, (marker, colour) in kinds.items():
                if kind in row.get("errors", {}):
                    at = labels.index(row["label"])
                    ax.plot(row["errors"][kind], at, marker, color=colour, markersize=6, alpha=0.9)
        ax.set(xscale="log", xlabel="relative error (root mean square)")
        ax.set_title(case["dtype"], loc="left")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        low, high = ax.get_xlim()
        ax.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    _embolden(axes[0][0])
    handles = [Line2D([], [], marker=m, color=c, linestyle="", label=ERRORS[k]) for k, (m, c) in kinds.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3)
    _place(figure, 0.3)
    return figure


def floor(record: Record) -> Figure | None:
    """How many times the floor each method takes."""
    cases = [c for c in record["cases"] if c["group"] in ("floor", "custom") and _ratios(c)][:8]
    if not cases:
        return None
    columns = min(2, len(cases))
    grid = [cases[at : at + columns] for at in range(0, len(cases), columns)]
    heights = [max(len(_ratios(case)) for case in row) for row in grid]
    figure, axes = plt.subplots(
        len(grid), columns, figsize=(WIDTH, 0.6 + sum(0.24 * h + 0.75 for h in heights)), squeeze=False,
        height_ratios=[h + 2 for h in heights],
    )  # fmt: skip
    _title(figure, record, "Forward and backward: times the floor (bare matrix products, or a copy of the logits)")
    for number, ax in enumerate(axes.flat):
        if number >= len(cases):
            ax.axis("off")
            continue
        _bars(ax, cases[number])
    _place(figure)
    return figure


def _bars(ax: Axes, case: Case) -> None:
    ratios = _ratios(case)
    labels = {row["method"]: row["label"] for row in case["rows"]}
    for at, (name, value) in enumerate(reversed(ratios.items())):
        ax.barh(at, value, color=LOOKS[name][0], height=0.7)
        ax.annotate(f"{value:.2f}", (value, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.axvline(1, color="black", linewidth=1.2)
    ax.set_yticks(range(len(ratios)), [labels[name] for name in reversed(ratios)], fontsize=8)
    ax.set_xlim(0, 1.15 * max(1.0, *ratios.values()))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="x", labelsize=8)
    head, _, dtype = _shape(case).rpartition(", ")
    ax.set_title(f"{head}\n{dtype}, {_tokens(case['tokens'])} tokens, from {case['start']}", fontsize=8.5, loc="left")
    _embolden(ax)


def _ratios(case: Case) -> dict[str, float]:
    names = [row["method"] for row in case["rows"] if row["status"] == "ok" and row["method"] != FLOOR]
    found = {name: ratio(case["rows"], name, FLOOR) for name in names}
    known = {name: value for name, value in found.items() if value is not None}
    return dict(sorted(known.items(), key=lambda pair: pair[1]))


# What they share


def _largest(record: Record, group: str, key: Callable[[Case], Any], x: Callable[[Case], float]) -> list[Case]:
    """The cases of a group that differ in x alone; of several such series the longest."""
    series: dict[Any, dict[float, Case]] = defaultdict(dict)
    for case in record["cases"]:
        if case["group"] in (group, "custom") and case["start"] == "hidden":
            series[key(case)].setdefault(x(case), case)
    longest = max(series.values(), key=len, default={})
    return [longest[at] for at in sorted(longest)] if len(longest) > 1 else []


def _lines(ax: Axes, cases: list[Case], x: Callable[[Case], float], y: Callable[[Row], float | None]) -> None:
    """A line a method."""
    for name in _names(cases):
        points = [(x(case), y(row)) for case in cases for row in _ok(case) if row["method"] == name]
        known = [(at, value) for at, value in points if value is not None and value > 0]
        colour, marker = LOOKS[name]
        style = "--" if name == FLOOR else "-"
        ax.plot(
            *zip(*known, strict=True) if known else ([], []), style, color=colour, marker=marker, markersize=6,
            linewidth=2.4 if name == OURS else 1.3, zorder=3 if name == OURS else 2,
        )  # fmt: skip


def _names(cases: list[Case]) -> Iterable[str]:
    return dict.fromkeys(row["method"] for case in cases for row in _ok(case))


def _ok(case: Case) -> list[Row]:
    return [row for row in case["rows"] if row["status"] == "ok"]


def _milliseconds(row: Row) -> float:
    return 1e3 * float(row["seconds"]["both"]["median"])


def _mebibytes(row: Row) -> float | None:
    """None for the floor, which keeps all logits and no gradient."""
    peak = row.get("peak_bytes")
    return None if peak is None or row["floor"] else peak / 2**20


def _shape(case: Case) -> str:
    head = case["head"]
    if case["start"] == "logits":
        return f"V {head['vocabulary']:,}, {case['dtype']}"
    name = "" if "x" in head["name"] and head["name"][0].isdigit() else f"{head['name']}, "
    return f"{name}D {head['width']:,}, V {head['vocabulary']:,}, {case['dtype']}"


def _tokens(count: int) -> str:
    if count % 2**20 == 0:
        return f"{count // 2**20}M"
    return f"{count // 2**10}k" if count % 2**10 == 0 else f"{count:,}"


def _title(figure: Figure, record: Record, text: str) -> None:
    """What it says, and on which machine."""
    height = figure.get_figheight()
    below = f"{machine_line(record)}; torch {record['versions']['torch']}; {record['made'][:10]}"
    figure.text(0.01, 1 - 0.06 / height, text, ha="left", va="top", fontsize=11, fontweight="bold")
    figure.text(0.01, 1 - 0.28 / height, below, ha="left", va="top", fontsize=9, color="#555555")


def _place(figure: Figure, below: float = 0.0) -> None:
    """Axes between the title and so many inches at the bottom."""
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, below / height, 1, 1 - 0.5 / height))


def _legend(figure: Figure, cases: list[Case], more: tuple[Line2D, ...] = ()) -> None:
    labels = {row["method"]: row["label"] for case in cases for row in _ok(case)}
    handles = [
        Line2D([], [], color=LOOKS[n][0], marker=LOOKS[n][1], linestyle="--" if n == FLOOR else "-", label=labels[n])
        for n in _names(cases)
    ]
    handles += more
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=9)
    _place(figure, 0.1 + 0.2 * -(-len(handles) // 3))


def _embolden(ax: Axes) -> None:
    for label in ax.get_yticklabels():
        if label.get_text().startswith("prefixloss"):
            label.set_fontweight("bold")
