"""`prefixloss detect`: annotate a file of responses, or measure a detector against human labels."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from prefixloss import check
from prefixloss.detect import tables
from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.choose import EXPECTED, by_name
from prefixloss.detect.evaluate import detected, evaluate, together
from prefixloss.detect.records import FORMS, LABELLED, FormatError, Record, read_records
from prefixloss.io.files import Growing, check_writable, json_line, write_whole
from prefixloss.io.visible import print_table, visible
from prefixloss.steps import SEGMENTERS


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
    chosen, records = opened(detector, file, form, steps)
    lines = Lines(out)
    found: list[FirstError] = []
    stopped = False
    with progress(len(records)) as tick, interruptible():
        try:
            for batch in detected(chosen, records, answers=True, batch_size=batch_size):
                lines.write(map(_annotated, records[len(found) : len(found) + len(batch)], batch))
                found += batch
                tick(len(batch))
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


class Lines:
    """The annotated lines, handed over as they are found: whatever ends the command, what was done is there."""

    def __init__(self, out: Path | None) -> None:
        try:
            self.file = None if out is None else Growing(out)
        except FileExistsError:
            raise fail(f"--out: {out}.part is left from a run that did not end; move it away or delete it") from None
        except OSError as error:
            raise fail(f"cannot write {out}: {error.strerror}") from None

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
def interruptible() -> Iterator[None]:
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
    files: Annotated[list[Path], typer.Argument(help="JSON lines with the labels; several are compared.")],
    form: Annotated[str, typer.Option("--format", help=f"Of the files: {', '.join(LABELLED)}.")] = "bigbench-mistake",
    detector: Annotated[
        list[str] | None, typer.Option(help=f"{EXPECTED}. Given several times, they are compared. [auto]")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Compare the values of this key of the lines, not the files.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Finds with less confidence count as none.")] = 0.0,
    answers: Annotated[bool, typer.Option("--answers", help="Tell the detector the right final answers.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Show some responses of each kind of error.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the reliability of the finds there, as PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure detectors against human labels of the first wrong step: how often they are right, how sure they are when
    they are, and what they cost."""
    if form not in LABELLED:
        raise fail(f"--format: got {form!r}, expected one with labels: {', '.join(LABELLED)}")
    opened = [(detector_of(name), name) for name in detector or ["auto"]]
    sources = _sources(files, form, by)
    check_can_write(json_file)
    check_can_write(picture)
    if picture and find_spec("matplotlib") is None:
        raise fail("--picture: needs matplotlib, which comes with prefixloss[rl]")
    for chosen, name in opened:
        load(chosen, name)
    rows = []
    with progress(len(opened) * sum(map(len, sources.values()))) as advance:
        for chosen, name in opened:
            for source, records in sources.items():
                scores = evaluate(
                    chosen, records, answers=answers, batch_size=batch_size, threshold=threshold, advance=advance
                )
                rows.append(tables.Row(source, name, scores))
    _show(rows, sources, errors)
    if json_file:
        figures = [{"file": row.source, "detector": row.detector, **row.scores.as_json()} for row in rows]
        text = json.dumps(figures[0] if len(figures) == 1 else {"rows": figures}, indent=1)
        with _writing(json_file):
            write_whole(json_file, lambda file: file.write(f"{text}\n".encode()))
    if picture:
        with _writing(picture):
            tables.draw(picture, rows)


def _sources(files: Sequence[Path], form: str, by: str | None) -> dict[str, list[Record]]:
    """The records of each file, or of each value of a key."""
    sources: dict[str, list[Record]] = {}
    for file in files:
        for record in records_of(file, form, "markers"):
            if by is not None and by not in record.source:
                raise fail(f"--by: got {by!r}, but a line of {file} has no such key")
            sources.setdefault(file.name if by is None else str(record.source[by]), []).append(record)
    return sources


def _show(rows: list[tables.Row], sources: dict[str, list[Record]], errors: bool) -> None:
    console = Console()
    if len(rows) == 1:
        print_table(console, tables.shares(rows[0]))
        print_table(console, tables.confusion(rows[0].scores))
    else:
        print_table(console, tables.side_by_side(rows))
    for name in dict.fromkeys(row.detector for row in rows):
        print_table(console, tables.reliability(name, together([r.scores for r in rows if r.detector == name])))
    if errors:
        for row in rows:
            if len(rows) > 1:
                typer.echo(visible(f"{row.source}, detector {row.detector}"))
            tables.show_errors(console, sources[row.source], row.scores)


def opened(detector: str, file: Path, form: str, steps: str) -> tuple[Detector, list[Record]]:
    """Everything that can be wrong with the arguments is found here, before any work."""
    if form not in FORMS:
        raise fail(f"--format: got {form!r}, expected one of {', '.join(FORMS)}")
    if steps not in SEGMENTERS:
        raise fail(f"--steps: got {steps!r}, expected one of {', '.join(SEGMENTERS)}")
    chosen, records = detector_of(detector), records_of(file, form, steps)
    load(chosen, detector)
    return chosen, records


def detector_of(name: str) -> Detector:
    try:
        return by_name(name)
    except ValueError as error:
        raise fail(f"--{error}") from None


def load(chosen: Detector, name: str) -> None:
    """What fails here would fail for every response."""
    try:
        chosen.load()
    except Exception as error:  # whatever a checkpoint, its code or a device brings
        raise fail(f"--detector: got {name!r}, which cannot be loaded: {check.first_line(error)}") from None


def records_of(file: Path, form: str, steps: str) -> list[Record]:
    try:
        return read_records(file, form, steps)  # type: ignore[arg-type]
    except FormatError as error:
        raise fail(str(error)) from None


def fail(message: str) -> typer.Exit:
    typer.echo(f"prefixloss: {visible(message)}", err=True)
    return typer.Exit(2)


def check_can_write(path: Path | None) -> None:
    """Before the work, not after it."""
    try:
        if path is not None:
            check_writable(path)
    except OSError as error:
        raise fail(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fail(f"cannot write {path}: {error.strerror}") from None


@dataclass(frozen=True)
class Ticks:
    """A progress bar, to be told how much was done. expect: how much there is, where that is known only later."""

    bar: Progress
    task: TaskID

    def __call__(self, count: int) -> None:
        self.bar.advance(self.task, count)

    def expect(self, total: int, done: int = 0) -> None:
        self.bar.update(self.task, total=total, completed=done)


@contextmanager
def progress(total: int | None, what: str = "detecting") -> Iterator[Ticks]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Ticks(bar, bar.add_task(what, total=total))
