"""What a run shows: a progress line while it goes, a table and a picture when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from prefixloss.io.files import write_whole
from prefixloss.io.visible import print_table, visible

SHOWN = {"loss": "loss {:.3f}", "good_prefix": "first error at token {:.0f}"}


class Report:
    """Progress on the terminal, then RUN/report.png and a table of the start and the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.began = time.monotonic()
        self.progress: Progress | None = None
        self.row = TaskID(0)
        self.pass_at_1: float | None = None

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[None]:
        """A bar for `total` steps, `done` of them from before; its speed counts this sitting's only."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        self.phase_began, self.phase_done = time.monotonic(), 0
        with Progress(*columns, console=self.console) as self.progress:
            self.row = self.progress.add_task(name, total=total, completed=done, speed="", shown="")
            yield

    def advance(self, **metrics: float) -> None:
        """One step done; `metrics` may hold loss, good_prefix, skipped, and others, which are not shown."""
        assert self.progress is not None
        self.phase_done += 1
        shown = [form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics]
        if self.pass_at_1 is not None:
            shown.insert(0, f"pass@1 {self.pass_at_1:.1%}")
        if metrics.get("skipped"):
            shown.append(f"[red]skipped {metrics['skipped']:.0f}[/red]")
        speed = f"{self.phase_done / (time.monotonic() - self.phase_began):.2f}/s"
        self.progress.update(self.row, advance=1, speed=speed, shown=", ".join(shown))

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Keep an evaluation on the screen; metrics without one are passed over."""
        if "pass@1" in metrics:
            self.pass_at_1 = metrics["pass@1"]
            rates = ", ".join(f"{name} {value:.1%}" for name, value in metrics.items() if name.startswith("pass@"))
            self.console.print(f"update {metrics['update']}: held-out {rates}")

    def finish(self, run: Path, history: list[dict[str, Any]], k: int) -> None:
        """Draw RUN/report.png and print the table."""
        plot(run / "report.png", history, k)
        table = Table(title=f"{history[-1]['update']} updates")
        for column in ("", "start", "end"):
            table.add_column(column, justify="right" if column else "left")
        updates = history[1:]
        for label, name, form in (
            ("held-out pass@1", "pass@1", "{:.1%}"),
            (f"held-out pass@{k}", f"pass@{k}", "{:.1%}"),
            ("training reward", "reward", "{:.1%}"),
            ("good prefix of wrong responses, tokens", "good_prefix", "{:.1f}"),
            ("right steps before the first error", "good_steps", "{:.2f}"),
            ("response length, tokens", "length", "{:.1f}"),
            ("KL to the start (k3)", "kl", "{:.4f}"),
            ("clipped share", "clip_share", "{:.2%}"),
            ("log-probs of the engine, away by", "sampler_gap", "{:.4f}"),
            ("divergence from the teacher", "divergence", "{:.4f}"),
        ):
            values = [m[name] for m in history if name in m]
            if values:
                table.add_row(label, form.format(values[0]), form.format(values[-1]))
        table.add_row("skipped steps", "", str(updates[-1]["skipped"]) if updates else "0")
        table.add_row("minutes in this sitting", "", f"{(time.monotonic() - self.began) / 60:.1f}")
        print_table(self.console, table)
        files = "metrics.jsonl, responses.jsonl, pages/, report.png, checkpoint.pt, policy/"
        self.console.print(visible(f"{run}: {files}"), highlight=False, markup=False)


def plot(path: Path, history: list[dict[str, Any]], k: int) -> None:
    """Held-out pass@1 and pass@k, length of the good prefix, KL and clipped share over the updates."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    rates, prefix, drift = figure.subplots(1, 3)

    def draw(axes: Any, name: str, **style: Any) -> list[Any]:
        points = [(m["update"], m[name]) for m in history if name in m]
        return list(axes.plot(*zip(*points, strict=True), **style)) if points else []

    for name in dict.fromkeys(("pass@1", f"pass@{k}")):
        draw(rates, name, marker="o", markersize=3, label=name)
    rates.set(title="held-out problems solved", ylim=(0, 1))
    rates.legend(loc="lower right")
    draw(prefix, "good_prefix", color="tab:green")
    prefix.set(title="good prefix of wrong responses, tokens", ylim=(0, None))
    lines = draw(drift, "kl", color="tab:purple", label="KL to the start (k3)")
    if any(m.get("kl", 0) > 0 for m in history):
        drift.set_yscale("log")  # k3 has a heavy tail: one token can lift an update's mean a thousandfold
    share = drift.twinx()
    lines += draw(share, "clip_share", color="tab:orange", alpha=0.6, label="clipped share (right)")
    drift.set(title="how far and how fast the policy moves")
    drift.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    for axes in (rates, prefix, drift):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))
