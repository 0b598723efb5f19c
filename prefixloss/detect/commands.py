"""`prefixloss detect`: annotate a file of responses, or measure a detector against human labels."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.choose import EXPECTED, by_name
from prefixloss.detect.evaluate import KINDS, Scores, evaluate, kind_of
from prefixloss.detect.records import FORMS, FormatError, Record, read_records
from prefixloss.io.files import Growing, check_writable, json_line, write_whole
from prefixloss.io.visible import print_table, visible
from prefixloss.steps import SEGMENTERS

_SHOWN_ERRORS = 5  # of each kind, with --errors


class _FileOrCommand(TyperGroup):
    """`detect FILE` is `detect annotate FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["annotate", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FileOrCommand,
    help="Find the first wrong step of responses: `detect FILE`, or `detect eval FILE` against human labels.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DetectorName = Annotated[str, typer.Option("--detector", help=f"{EXPECTED}.")]
Form = Annotated[str, typer.Option("--format", help=f"Of the file: {', '.join(FORMS)}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Responses handed to the detector at once.")]


@app.command()
def annotate(
    file: Annotated[Path, typer.Argument(help='JSON lines: "problem", and "steps" or "response"; perhaps "answer".')],
    out: Annotated[
        Path | None, typer.Option(help="Where the lines go, with their first error. [standard output]")
    ] = None,
    detector: DetectorName = "auto",
    form: Form = "plain",
    steps: Annotated[str, typer.Option(help=f"How a response is cut: {', '.join(SEGMENTERS)}.")] = "markers",
    batch_size: BatchSize = 64,
) -> None:
    """Add steps, first_error (from 0, null for none), reason and confidence to each line."""
    chosen, records = _opened(detector, file, form, steps)
    lines = _Lines(out)
    found: list[FirstError] = []
    stopped = False
    with _progress(len(records)) as tick, _interruptible():

        def advance(count: int) -> None:
            tick(count)
            lines.write(map(_annotated, records[len(found) - count :], found[len(found) - count :]))

        try:
            evaluate(
                chosen, records, answers=True, batch_size=batch_size, clock=time.monotonic, advance=advance, found=found
            )
        except KeyboardInterrupt:
            stopped = True
        except BaseException:
            lines.end(whole=False)
            raise
    where = lines.end(whole=not stopped)
    wrong, silent = (
        sum(result.step is not None for result in found),
        sum(result.step is None and result.confidence == 0 for result in found),
    )
    done = f"stopped: {len(found)} of {len(records)}" if stopped else str(len(found))
    typer.echo(f"{done} responses{where}: an error in {wrong}, nothing to say of {silent}", err=True)
    if stopped:
        raise typer.Exit(130)


class _Lines:
    """The annotated lines, handed over as they are found: whatever ends the command, what was done is there."""

    def __init__(self, out: Path | None) -> None:
        try:
            self.file = None if out is None else Growing(out)
        except FileExistsError:
            raise _fail(f"--out: {out}.part is left from a run that did not end; move it away or delete it") from None
        except OSError as error:
            raise _fail(f"cannot write {out}: {error.strerror}") from None

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """To the file; to standard output where there is none, or where it cannot be written any more."""
        data = b"".join(map(json_line, lines))
        if self.file is None:
            typer.echo(data, nl=False)
            return
        try:
            self.file.write(data)
        except OSError as error:
            typer.echo(data, nl=False)
            raise self._cut_off(error) from None

    def end(self, whole: bool) -> str:
        """Where the lines are, if that is not where they should be."""
        if self.file is None:
            return ""
        try:
            if whole:
                self.file.finish()
                return ""
            return f" in {self.file.part}" if self.file.leave() else ""
        except OSError as error:
            raise self._cut_off(error) from None

    def _cut_off(self, error: OSError) -> typer.Exit:
        assert self.file is not None
        part = visible(str(self.file.part))
        typer.echo(f"prefixloss: cannot write {part}: {error.strerror}; what was done is there", err=True)
        return typer.Exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A job that is told to end, by SIGTERM, is interrupted as by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _annotated(record: Record, found: FirstError) -> dict[str, Any]:
    return {
        **record.source,
        "problem": record.problem,
        "steps": record.steps,
        "first_error": found.step,
        "reason": found.reason,
        "confidence": round(found.confidence, 4),
    }


@app.command(name="eval")
def eval_(
    file: Annotated[Path, typer.Argument(help="JSON lines with the labels.")],
    form: Form = "bigbench-mistake",
    detector: DetectorName = "auto",
    answers: Annotated[bool, typer.Option("--answers", help="Tell the detector the right final answers.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Show some responses of each kind of error.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure a detector against human labels of the first wrong step."""
    if form == "plain":
        raise _fail("--format: got 'plain', which has no labels")
    chosen, records = _opened(detector, file, form, "markers")
    _check_writable(json_file)
    with _progress(len(records)) as advance:
        scores, found = evaluate(
            chosen, records, answers=answers, batch_size=batch_size, clock=time.monotonic, advance=advance
        )
    console = Console()
    for table in (_shares(file.name, detector, scores), _confusion(scores)):
        print_table(console, table)
    if errors:
        _show_errors(console, records, found)
    if json_file:
        _write(json_file, {"file": file.name, "detector": detector, **scores.as_json()})


def _opened(detector: str, file: Path, form: str, steps: str) -> tuple[Detector, list[Record]]:
    """Everything that can be wrong with the arguments is found here, before any work."""
    if form not in FORMS:
        raise _fail(f"--format: got {form!r}, expected one of {', '.join(FORMS)}")
    if steps not in SEGMENTERS:
        raise _fail(f"--steps: got {steps!r}, expected one of {', '.join(SEGMENTERS)}")
    try:
        return by_name(detector), read_records(file, form, steps)
    except FormatError as error:
        raise _fail(str(error)) from None
    except ValueError as error:
        raise _fail(f"--{error}") from None


def _fail(message: str) -> typer.Exit:
    typer.echo(f"prefixloss: {visible(message)}", err=True)
    return typer.Exit(2)


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    try:
        if path is not None:
            check_writable(path)
    except OSError as error:
        raise _fail(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, figures: dict[str, Any]) -> None:
    try:
        write_whole(path, lambda file: file.write((json.dumps(figures, indent=1) + "\n").encode()))
    except OSError as error:
        raise _fail(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("detecting", total=total)
        yield lambda count: progress.advance(task, count)


def _shares(name: str, detector: str, scores: Scores) -> Table:
    table = Table(title=Text(visible(f"{name}, detector {detector}")), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    f1 = "-" if scores.f1 is None else f"{100 * scores.f1:.1f}"
    for label, value in (
        ("responses", str(len(scores.pairs))),
        *((kind, f"{scores.share(kind):.1%}") for kind in KINDS),
        ("nothing to say", f"{scores.unsure / len(scores.pairs):.1%}"),
        ("ProcessBench F1", f1),
        ("steps/s", f"{scores.steps / max(scores.seconds, 1e-9):,.0f}"),
    ):
        table.add_row(label, value)
    return table


def _confusion(scores: Scores) -> Table:
    counts = scores.confusion()
    names = ["none", *(str(step) for step in range(1, len(counts) - 1)), f"{len(counts) - 1}+"]
    table = Table(title="first wrong step: labelled (down) and found (across)", title_justify="left")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for row, name in enumerate(names):
        cells = [f"[bold]{n}[/bold]" if n and row == column else str(n or "") for column, n in enumerate(counts[row])]
        table.add_row(name, *cells)
    return table


def _show_errors(console: Console, records: list[Record], found: list[FirstError]) -> None:
    for kind in KINDS[1:]:
        wrong = [
            (number, record, result)
            for number, (record, result) in enumerate(zip(records, found, strict=True), 1)
            if kind_of(-1 if record.label is None else record.label, result.step) == kind
        ]
        for number, record, result in wrong[:_SHOWN_ERRORS]:
            labelled, said = _name(record.label), _name(result.step)
            head = f"{kind}, response {number}: labelled {labelled}, found {said}: {result.reason}"
            console.print(Text(visible(head)))
            if result.step is not None:
                console.print(Text(visible(f"    {record.steps[result.step].strip()[:300]}")))


def _name(step: int | None) -> str:
    return "none" if step is None or step < 0 else f"step {step + 1}"
