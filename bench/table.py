"""A record as tables, in the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .harness import ratio
from .methods import FLOOR, OURS
from .record import Record, machine_line

ERRORS = {
    "loss": "loss", "logps": "log-probs", "d_hidden": "d hidden", "d_weight": "d head", "d_logits": "d logits"
}  # fmt: skip


class Grid(NamedTuple):
    """title; columns; rows of cells; lines below."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def grids(record: Record) -> Iterator[Grid]:
    for case in record["cases"]:
        yield times(case)
    for case in record["cases"]:
        if any("errors" in row for row in case["rows"]):
            yield errors(case)


def times(case: dict[str, Any]) -> Grid:
    columns = (
        "method", "forward\nms", "backward\nms", "both\nms", "quartiles\nms", "ours\n/ it", "it /\nfloor", "peak\nMiB",
        "same\nbits",
    )  # fmt: skip
    rows = [_times_row(row, case["rows"]) for row in case["rows"] if row["status"] == "ok"]
    notes = [f"{row['label']}: {row['status']}: {row['why']}" for row in case["rows"] if row["status"] not in SILENT]
    left_out = [row["label"] for row in case["rows"] if row["status"] == "left out"]
    if left_out:
        notes.append(f"left out: {', '.join(left_out)}")
    head = case["head"]
    size = f"D {head['width']:,}, V {head['vocabulary']:,}"
    where = f"{case['dtype']}, from {case['start']}; {case['setting']}"
    title = f"{head['name']} ({size}), {case['tokens']:,} tokens, {where}: {case['learning_share']:.1%} learn"
    return Grid(title, columns, rows, notes)


SILENT = ("ok", "left out")


def _times_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    seconds = row["seconds"]
    spread = " to ".join(f"{1e3 * seconds['both'][edge]:,.1f}" for edge in ("low", "high"))
    peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f}"
    return (
        row["label"],
        *(f"{1e3 * seconds[part]['median']:,.1f}" for part in ("forward", "backward", "both")),
        spread,
        _ratio(None if row["method"] == OURS else ratio(rows, OURS, row["method"])),
        _ratio(None if row["method"] == FLOOR else ratio(rows, row["method"], FLOOR)),
        peak,
        "yes" if row["repeats"] else "no",
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def errors(case: dict[str, Any]) -> Grid:
    """Relative errors against float64; a dash where a method does not give the figure."""
    measured = [row for row in case["rows"] if "errors" in row]
    kinds = [kind for kind in ERRORS if any(kind in row["errors"] for row in measured)]
    rows = [
        (row["label"], *(f"{row['errors'][kind]:.1e}" if kind in row["errors"] else "-" for kind in kinds))
        for row in measured
    ]
    few = measured[0]["errors"]
    title = f"Relative error against float64: {case['head']['name']}, {case['dtype']}, from {case['start']}"
    note = f"{few['draws']} draws of {few['tokens']} tokens, all learning, clip and k3; root mean square"
    return Grid(title, ("method", *(ERRORS[kind] for kind in kinds)), rows, [note])


def show(record: Record, console: Console) -> None:
    for grid in grids(record):
        show_grid(grid, console)
    console.print(made_on(record), markup=False)


def show_grid(grid: Grid, console: Console) -> None:
    table = Table(title=grid.title, title_justify="left", title_style="bold")
    for number, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row, style="bold" if row[0].startswith("prefixloss") else None)
    console.print()
    console.print(table)
    for note in grid.notes:
        console.print(f"  {note}", markup=False, highlight=False)


def markdown(record: Record) -> str:
    parts = []
    for grid in grids(record):
        columns = tuple(
            column.replace("\n", ", " if column.endswith(("ms", "MiB")) else " ") for column in grid.columns
        )
        lines = [
            f"**{grid.title}**",
            "",
            _markdown_row(columns),
            _markdown_row(("---",) + ("---:",) * (len(columns) - 1)),
        ]
        lines += [_markdown_row(row) for row in grid.rows]
        lines += ["", *(f"{note}  " for note in grid.notes)] if grid.notes else []
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, made_on(record)]) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def made_on(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{machine_line(record)}; {versions}; {record['made'][:10]}; `{record['command']}`"
