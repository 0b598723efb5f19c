"""Tables and pictures of `bench.method`, from its JSON alone. Intervals are 95 % t intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefixloss.io.files import write_whole

from . import judge as method_judge
from . import runs as method_runs
from . import tree as method_tree

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
# Okabe and Ito: told apart by the colour-blind too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
Run = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    t = _T[min(len(values) - 2, len(_T) - 1)]
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def of(runs: Sequence[Run], condition: method_runs.Condition, seeds: int) -> list[Run]:
    """A condition's runs in the order of their seeds."""
    return sorted((r for r in runs if r["key"] == condition.key and r["seed"] < seeds), key=lambda r: r["seed"])


def at_end(runs: Iterable[Run], metric: str) -> list[float]:
    return [run["curve"][-1][metric] for run in runs]


def write(directory: Path, tree: dict[str, Any], runs: Sequence[Run], judges: dict[str, Any] | None = None) -> str:
    """Writes the pictures and results.md into the directory; returns the latter's text."""
    done = [name for name in method_runs.EXPERIMENTS if complete(name, runs)]
    pictures = {"tree": draw_tree(tree)}
    draw: dict[str, Callable[[Sequence[Run]], Figure]] = {
        "compare": partial(draw_curves, name="compare"), "inflation": draw_inflation, "alpha": draw_alpha,
        "noise": draw_noise, "teacher": partial(draw_curves, name="teacher"),
        "tolerance": partial(draw_curves, name="tolerance"),
        "judge": partial(draw_curves, name="judge"),
    }  # fmt: skip
    pictures |= {name: draw[name](runs) for name in done}
    if judges is not None:
        pictures["judges"] = draw_judges(judges)
    for name, figure in pictures.items():
        image = BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(image, dpi=110, format="png")
        write_whole(directory / f"{name}.png", lambda file, image=image: file.write(image.getvalue()))  # type: ignore[misc]
    tables = [tree_table(tree), *(table(name, runs) for name in done)]
    if judges is not None:
        tables.append(method_judge.table(judges))
    text = "\n\n".join([HEAD, *tables]) + "\n"
    write_whole(directory / "results.md", lambda file: file.write(text.encode()))
    return text


def complete(name: str, runs: Sequence[Run]) -> bool:
    seeds = method_runs.SEEDS[name]
    return all(len(of(runs, condition, seeds)) == seeds for condition in method_runs.EXPERIMENTS[name])


# ---- tables ------------------------------------------------------------------------------------------------

HEAD = """# What the method does, at a small size

Made by `python -m bench.method show` from `tree.json` and `runs.jsonl`, which `python -m bench.method all` measures.
Plus and minus are 95 % t intervals over seeds. The differences are between runs of the same seed, which start
from the same policy."""


def tree_table(tree: dict[str, Any]) -> str:
    depths = list(next(iter(tree["needed"].values())))
    lines = [
        f"## The theorem's tree: samples until the path has probability {1 - tree['epsilon']:g}",
        f"{tree['runs']} runs a depth, step size {tree['eta']}, alpha {tree['alpha']}, groups of {tree['group']}.",
        "",
        "| reward | " + " | ".join(f"H = {h}" for h in depths) + " | doublings a layer | power of H |",
        "|---|" + "---|" * (len(depths) + 2),
    ]
    for signal, by_depth in tree["needed"].items():
        growth = tree["growth"][signal]
        cells = [f"{statistics.fmean(by_depth[h]):,.0f}" for h in depths]
        cells += [f"{growth['doublings_a_layer']:.2f}", f"{growth['power_of_depth']:.1f}"]
        lines.append(f"| {signal} | " + " | ".join(cells) + " |")
    return "\n".join([lines[0], "", *lines[1:]])


_TITLES = {
    "compare": "Credit assignments on the built-in task",
    "inflation": "Steps a response, when every true equation counts as a right step",
    "alpha": "The value of a good prefix",
    "noise": "A detector that errs",
    "teacher": "A teacher beside the advantages, and alone",
    "tolerance": "A gradient tolerance",
    "judge": "Who finds the first errors",
}
# columns of differences in pass@1, seed by seed: what they are called, to which condition, with which sign
_GAPS = {
    "compare": [("pass@1 over GRPO", "GRPO", 1), ("VPPO over it", "VPPO", -1)],
    "noise": [("pass@1 over GRPO", "GRPO", 1)],
    "teacher": [("pass@1 over VPPO", "VPPO", 1)],
    "tolerance": [("pass@1 over VPPO", "VPPO", 1)],
    "judge": [("pass@1 over GRPO", "GRPO", 1), ("over the exact check", "exact check", 1)],
}


# and what else is told of an experiment
_MORE = {"inflation": ["steps", "length"], "tolerance": ["gradient_left_out"]}
_NOTES = {
    "tolerance": f"""

"auto" is that of bfloat16 gradients, {method_runs.AUTO:g}, in float32 runs, whose own "auto" is next to nothing. With
31 tokens dense products are always faster, and the package then leaves out nothing; these runs were made to leave out
what the tolerance allows. gradient_left_out: the share of the logits' gradient in norm, in the last updates."""
}


def table(name: str, runs: Sequence[Run]) -> str:
    """An experiment's runs at their end."""
    seeds = method_runs.SEEDS[name]
    conditions = method_runs.EXPERIMENTS[name]
    ends = {c.name: at_end(of(runs, c, seeds), "pass@1") for c in conditions}
    gaps = _GAPS.get(name, [])
    metrics = ["pass@1", f"pass@{method_runs.SMALL.k}", *_MORE.get(name, [])]
    heads = [*metrics, *(head for head, _, _ in gaps)]
    lines = [
        f"## {_TITLES[name]}",
        "",
        f"{seeds} seeds, {method_runs.SMALL.updates} updates.{_NOTES.get(name, '')}",
        "",
    ]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    first = [run["curve"][0] for run in of(runs, conditions[0], seeds)]
    start = [_cell([point[m] for point in first], m) if m in first[0] else "" for m in metrics]
    lines.append("| at the start | " + " | ".join([*start, *("" for _ in gaps)]) + " |")
    for condition in conditions:
        mine = of(runs, condition, seeds)
        cells = [_cell(at_end(mine, m), m) if m in mine[0]["curve"][-1] else "" for m in metrics]
        for _, other, sign in gaps:
            gap = [sign * (a - b) for a, b in zip(ends[condition.name], ends[other], strict=True)]
            cells.append("" if condition.name == other else _cell(gap, "pass@1", signed=True))
        lines.append(f"| {condition.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], metric: str, signed: bool = False) -> str:
    mean, half = interval(values)
    if metric == "gradient_left_out":
        return f"{mean:.1e}"
    share = metric.startswith("pass")
    scale, unit = (100, " %") if share else (1, "")
    sign = "+" if signed else ""
    return f"{mean * scale:{sign}.1f} ± {half * scale:.1f}{unit}"


# ---- pictures ----------------------------------------------------------------------------------------------


def _figure(panels: int = 1, width: float = 8.0, height: float = 3.6) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    return figure, list(axes)


def draw_tree(tree: dict[str, Any]) -> Figure:
    figure, axes = _figure(2, height=3.9)
    depths = [int(h) for h in next(iter(tree["needed"].values()))]
    for ax, suffix, title in zip(axes, ("", ", groups"), ("one sample a step", "groups of 8 a step"), strict=True):
        for i, kind in enumerate(("outcome", "first error")):
            spans = [interval(tree["needed"][kind + suffix][str(h)]) for h in depths]
            low, high = ([m + sign * half for m, half in spans] for sign in (-1, 1))
            style = {"color": _COLOURS[1 - i], "marker": _MARKERS[i], "markersize": 4}
            ax.plot(depths, [m for m, _ in spans], label=f"{kind} reward", **style)
            ax.fill_between(depths, low, high, color=style["color"], alpha=0.2, linewidth=0)
        ax.set_yscale("log", base=10)
        ax.set_xlabel("depth of the tree")
        ax.set_title(title, fontsize=10)
    bound = {"color": "0.4", "linewidth": 1}
    axes[0].plot(depths, [method_tree.lower_bound(h) for h in depths], "--", label="$2^H / (\\eta H)$", **bound)
    upper = [method_tree.upper_bound(h) for h in depths]
    axes[0].plot(depths, upper, ":", label="$H / (\\eta\\alpha) \\; \\ln(H / \\epsilon)$", **bound)
    axes[0].set_ylabel("samples until the path has\nprobability 0.9")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle("Finding one path in a binary tree: outcome against first-error reward", fontsize=11)
    return figure


def _curves(ax: Any, runs: Sequence[Run], name: str, metric: str, scale: float, from_start: bool = False) -> None:
    """A condition's mean and a thin line a seed; `from_start`: of the change since the start, and its interval."""
    seeds = method_runs.SEEDS[name]
    for i, condition in enumerate(method_runs.EXPERIMENTS[name]):
        mine = of(runs, condition, seeds)
        points = [[p for p in run["curve"] if metric in p] for run in mine]
        updates = [p["update"] for p in points[0]]
        first = [p[0][metric] if from_start else 0.0 for p in points]
        spans = [
            interval([scale * (p[metric] - start) for p, start in zip(column, first, strict=True)])
            for column in zip(*points, strict=True)
        ]
        ax.plot(
            updates, [m for m, _ in spans], color=_COLOURS[i], marker=_MARKERS[i], markersize=4, label=condition.name
        )
        if from_start:
            low, high = ([m + sign * half for m, half in spans] for sign in (-1, 1))
            ax.fill_between(updates, low, high, color=_COLOURS[i], alpha=0.1, linewidth=0)
        else:
            for column in points:
                ax.plot(updates, [scale * p[metric] for p in column], color=_COLOURS[i], alpha=0.4, linewidth=0.8)
    ax.set_xlabel("updates")


def draw_curves(runs: Sequence[Run], name: str) -> Figure:
    figure, axes = _figure(2, height=3.9)
    for ax, k in zip(axes, (1, method_runs.SMALL.k), strict=True):
        _curves(ax, runs, name, f"pass@{k}", 100, from_start=True)
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_ylabel(f"held-out pass@{k}: gain (percentage points)")
    axes[0].legend(frameon=False, fontsize=8)
    seeds = method_runs.SEEDS[name]
    figure.suptitle(f"Built-in task: gain since the common start, {seeds} seeds, 95 % intervals", fontsize=11)
    return figure


SURE = 10  # finds, below which a share of right ones says little


def draw_judges(judges: dict[str, Any]) -> Figure:
    """Where they put the first error of wrong responses, and how sure they are when they are right."""
    figure, (places, sure) = _figure(2, width=12.0, height=3.9)
    names, left = list(judges["judges"]), [0.0] * len(judges["judges"])
    for i, kind in enumerate(("exact", "earlier", "later", "none found")):
        shares = [100 * s["shares"][kind] * judges["responses"] / judges["wrong"] for s in judges["judges"].values()]
        if kind == "exact":  # right responses that are left alone count as exact, too
            shares = [100 * s["exact_among_wrong"] for s in judges["judges"].values()]
        places.barh(names, shares, left=left, color=_COLOURS[i], label=kind)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    places.invert_yaxis()
    places.set_xlabel("share of wrong responses (%)")
    places.legend(frameon=False, fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.3, 1.0))
    sure.plot([0, 1], [0, 1], ":", color="0.4")
    for i, (name, scores) in enumerate(judges["judges"].items()):
        bins = [b for b in scores["reliability"] if b["verdicts"] >= SURE]
        mean, right = [b["confidence"] for b in bins], [b["right"] / b["verdicts"] for b in bins]
        sure.plot(mean, right, color=_COLOURS[i], marker=_MARKERS[i], markersize=4, label=name)
    sure.set_xlabel(f"confidence of a find, bins of {SURE} and more")
    sure.set_ylabel("share that is exact")
    sure.set(xlim=(0, 1.02), ylim=(0, 1.05))
    sure.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def draw_inflation(runs: Sequence[Run]) -> Figure:
    figure, axes = _figure(2, height=3.9)
    for ax, metric, label, scale in zip(
        axes, ("steps", "pass@1"), ("steps a response", "held-out pass@1 (%)"), (1, 100), strict=True
    ):
        _curves(ax, runs, "inflation", metric, scale)
        ax.set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Any true equation counts as a right step: means (thick) and each seed (thin)", fontsize=11)
    return figure


def _points(ax: Any, runs: Sequence[Run], name: str, conditions: Sequence[method_runs.Condition]) -> None:
    """Means, and a line a seed: runs of a seed start from the same policy."""
    seeds = method_runs.SEEDS[name]
    ends = [[100 * v for v in at_end(of(runs, condition, seeds), "pass@1")] for condition in conditions]
    places = range(len(conditions))
    for i, column in enumerate(zip(*ends, strict=True)):
        ax.plot(places, column, color="0.6", linewidth=0.8, marker=".", label="a seed each" if i == 0 else None)
    means = [statistics.fmean(values) for values in ends]
    ax.plot(places, means, color=_COLOURS[0], linestyle="", marker="o", markersize=8, label="mean")
    ax.set_xticks(places, [c.name.replace(" ", "\n") for c in conditions])
    ax.set_ylabel("held-out pass@1 (%)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def draw_alpha(runs: Sequence[Run]) -> Figure:
    figure, (ax,) = _figure(width=6.0)
    _points(ax, runs, "alpha", method_runs.EXPERIMENTS["alpha"])
    ax.set_xlabel("alpha, the value of a good-prefix token")
    ax.set_title(f"VPPO after {method_runs.SMALL.updates} updates, {method_runs.SEEDS['alpha']} seeds", fontsize=11)
    return figure


def draw_noise(runs: Sequence[Run]) -> Figure:
    figure, (ax,) = _figure()
    _points(ax, runs, "noise", method_runs.EXPERIMENTS["noise"])
    ax.set_xlabel("first errors that are moved to an earlier or later step, or missed")
    ax.set_title(f"VPPO with a detector that errs, and GRPO; {method_runs.SEEDS['noise']} seeds", fontsize=11)
    return figure
