"""A record as tables, in the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
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
        notes.append(f"left out: {'; '.join(left_out)}")
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


def summary(record: Record) -> Iterator[Grid]:
    """A table a group of cases, for a README: a column a case, with times, and times the floor or peak memory."""
    for group, title in GROUPS.items():
        for start in ("hidden", "logits"):
            cases = [case for case in record["cases"] if (case["group"], case["start"]) == (group, start)]
            if cases:
                yield _pivot(cases, title if start == "hidden" else f"{title}, from logits")


# of each set: what its table shows
GROUPS = {
    "floor": "Beside the floor: ms (times the floor)",
    "models": "A real model's head: ms (times the floor of that setting)",
    "length": "Against length: ms, peak MiB above the inputs",
    "share": "Against the learning share: ms (times the floor of that share)",
    "custom": "ms (times the floor)",
}


def _pivot(cases: list[dict[str, Any]], title: str) -> Grid:
    """Methods down, cases across: headings have only what differs between cases, the title has the rest."""
    described = [_described(case) for case in cases]
    alike = [values[0] for values in zip(*described, strict=True) if len(set(values)) == 1]
    differ = [at for at, values in enumerate(zip(*described, strict=True)) if len(set(values)) > 1]
    columns = ["; ".join(values[at] for at in differ) or "ms" for values in described]
    labels = {row["method"]: row["label"] for case in cases for row in case["rows"] if row["status"] != "left out"}
    rows = [(label, *(_cell(case, name) for case in cases)) for name, label in labels.items()]
    why = [f"{row['label']}: {row['why']}" for case in cases for row in case["rows"] if row["status"] not in SILENT]
    return Grid(f"{title}. {'; '.join(alike)}", ("method", *columns), rows, [*dict.fromkeys(why), *_left_out(cases)])


def _left_out(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Who has no cell here, or only some."""
    absent = [{row["label"]: None for row in case["rows"] if row["status"] == "left out"} for case in cases]
    everywhere = [label for label in absent[0] if all(label in labels for labels in absent)]
    somewhere = [label for label in dict.fromkeys(chain(*absent)) if label not in everywhere]
    for labels, what in ((everywhere, "left out"), (somewhere, "left out of some columns")):
        if labels:
            yield f"{what} (`--methods all` runs all): {'; '.join(labels)}"


def _described(case: dict[str, Any]) -> tuple[str, ...]:
    head = case["head"]
    size = (
        f"V {head['vocabulary']:,}" if case["start"] == "logits" else f"D {head['width']:,}, V {head['vocabulary']:,}"
    )
    setting = f"{case['setting']}: {case['learning_share']:.0%} learn"
    return head["name"], size, f"{case['tokens']:,} tokens", case["dtype"], setting


def _cell(case: dict[str, Any], name: str) -> str:
    row = next((row for row in case["rows"] if row["method"] == name), None)
    if row is None or row["status"] == "left out":
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    milliseconds = 1e3 * row["seconds"]["both"]["median"]
    text = f"{milliseconds:,.0f}" if milliseconds >= 10 else f"{milliseconds:.1f}"
    if case["group"] == "length":
        return text if row.get("peak_bytes") is None else f"{text}, {row['peak_bytes'] / 2**20:,.0f}"
    times_floor = None if name == FLOOR else ratio(case["rows"], name, FLOOR)
    return text if times_floor is None else f"{text} ({times_floor:.2f})"


def in_turns(rows: list[dict[str, Any]], title: str, base: str, errors: Sequence[tuple[str, str]] = ()) -> Grid:
    """What `turns.measure` found beside the method that is called `base` here. errors: what rows call each of those
    that they have, and its heading."""
    cells: list[tuple[str, ...]] = [
        (
            row["method"], f"{1e3 * row['seconds']:,.1f}", f"{row['times_the_floor']:.2f}",
            *(f"{row[name]:.1e}" if name in row else "" for name, _ in errors),
            f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "",
        )
        for row in rows
        if "error" not in row
    ]  # fmt: skip
    notes = [f"{row['method']}: {row['error']}" for row in rows if "error" in row]
    columns = ("method", "both\nms", f"it /\n{base}", *(heading for _, heading in errors), "peak\nMiB")
    return Grid(title, columns, cells, notes)


def kept_entries(rows: list[dict[str, float]]) -> Grid:
    """What `own_model.density` found."""
    columns = ("tolerance", "entries kept", "rows with none", "head rows touched", "left out of the norm")
    cells: list[tuple[str, ...]] = [
        (
            f"{row['tolerance']:.1e}", f"{row['kept']:.1e}", f"{row['rows_with_none']:.0%}", f"{row['head_rows']:.0%}",
            f"{row['left_out']:.1e}",
        )
        for row in rows
    ]  # fmt: skip
    return Grid("The logits' gradient", columns, cells, [])


def of_model(rows: list[dict[str, Any]], title: str) -> Grid:
    """What `own_model.measure` found."""
    return in_turns(rows, title, "floor", (("d_hidden", "error of\nd hidden"), ("d_weight", "error of\nd head")))


def show(record: Record, console: Console, short: bool = False) -> None:
    for grid in chosen(record, short):
        show_grid(grid, console)
    console.print(made_on(record), markup=False)


def chosen(record: Record, short: bool) -> list[Grid]:
    """Every table, or the summaries and the errors."""
    every = list(grids(record))
    return [*summary(record), *every[len(record["cases"]) :]] if short else every


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


def markdown(record: Record, short: bool = False) -> str:
    return "\n\n".join([*map(_markdown_grid, chosen(record, short)), made_on(record)]) + "\n"


def _markdown_grid(grid: Grid) -> str:
    columns = tuple(column.replace("\n", ", " if column.endswith(("ms", "MiB")) else " ") for column in grid.columns)
    rule = ("---",) + ("---:",) * (len(columns) - 1)
    lines = [f"**{grid.title}**", "", *map(_markdown_row, (columns, rule, *grid.rows))]
    return "\n".join([*lines, *([""] if grid.notes else []), *(f"- {note}" for note in grid.notes)])


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def made_on(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{machine_line(record)}; {versions}; {record['made'][:10]}; `{record['command']}`"
