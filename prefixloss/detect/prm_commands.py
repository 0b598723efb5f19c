"""`prefixloss prm`: label responses step by step, and train a process reward model on the labels."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixloss.check import UsageError
from prefixloss.detect import tables
from prefixloss.detect.base import FirstError
from prefixloss.detect.choose import EXPECTED
from prefixloss.detect.commands import Lines, fail, interruptible, opened, progress, records_of
from prefixloss.detect.evaluate import detected
from prefixloss.detect.maths.answers import states
from prefixloss.detect.prm_examples import Settings
from prefixloss.detect.prm_run import part_of, settings_of
from prefixloss.detect.records import FORMS, LABELLED, Record
from prefixloss.io.visible import print_table, visible
from prefixloss.steps import SEGMENTERS

app = typer.Typer(
    help="Label responses step by step, and train a process reward model on the labels.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def label(
    file: Annotated[Path, typer.Argument(help='JSON lines: "problem", and "steps" or "response"; perhaps "answer".')],
    detector: Annotated[str, typer.Option(help=f"What labels them: {EXPECTED}.")],
    out: Annotated[Path | None, typer.Option(help="Where the labelled lines go. [standard output]")] = None,
    form: Annotated[str, typer.Option("--format", help=f"Of the file: {', '.join(FORMS)}.")] = "plain",
    steps: Annotated[str, typer.Option(help=f"How a response is cut: {', '.join(SEGMENTERS)}.")] = "markers",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Verdicts with less confidence are left out.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses handed to the detector at once.")] = 64,
) -> None:
    """Write the responses of which the detector says something, with first_error (from 0, null for none), as
    `prm train` and `detect eval --format labelled` read them; by rollouts with soft labels, too: chances, how likely
    each step is right (null behind the first wrong one). A response with the right answer in which no error is
    found counts as right throughout; other ones without a verdict are left out."""
    chosen, records = opened(detector, file, form, steps)
    lines, done, written, wrong = Lines(out), 0, 0, 0
    whole = False
    try:
        with progress(len(records), "labelling") as tick, interruptible():
            for batch in detected(chosen, records, answers=True, batch_size=batch_size):
                pairs = list(zip(records[done : done + len(batch)], batch, strict=True))
                kept = [pair for pair in pairs if _has_label(*pair, threshold)]
                lines.write(_labelled(*pair) for pair in kept)
                done, written = done + len(batch), written + len(kept)
                wrong += sum(found.step is not None for _, found in kept)
                tick(len(batch))
            whole = True
    finally:
        where = lines.end(whole=whole)
    found = f"an error in {wrong}, none in {written - wrong}"
    typer.echo(f"{written} of {done} responses labelled{where}: {found}", err=True)


def _has_label(record: Record, found: FirstError, threshold: float) -> bool:
    if found.step is None and record.answer is not None and states("\n".join(record.steps), record.answer):
        return bool(record.steps)
    return found.confidence > 0 and found.confidence >= threshold


def _labelled(record: Record, found: FirstError) -> dict[str, Any]:
    own: dict[str, Any] = {"problem": record.problem, "steps": record.steps, "first_error": found.step}
    if record.answer is not None:
        own["answer"] = record.answer
    if found.chances:
        own["chances"] = [None if chance is None else round(chance, 4) for chance in found.chances]
    return {**own, "reason": found.reason, "confidence": round(found.confidence, 4)}


@app.command()
def train(
    ctx: typer.Context,
    files: Annotated[list[Path] | None, typer.Argument(help="JSON lines with labels of the first wrong step.")] = None,
    base: Annotated[str | None, typer.Option("--model", help="Directory or hub name whose body is trained.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New directory for the process reward model and its report.json.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="The --out of a run that did not end, to go on with its own settings.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help=f"Of the files: {', '.join(LABELLED)}.")] = "labelled",
    separator: Annotated[str, typer.Option(help="Token behind each step; added if it is none.")] = "<extra_0>",
    epochs: Annotated[int, typer.Option(help="Passes; the one with the lowest held-out loss is kept.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Responses a step.")] = 16,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put several responses of a step into one row, where they have room.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-5,
    held_out: Annotated[float, typer.Option(help="Share of the problems kept for the report.")] = 0.1,
    max_tokens: Annotated[int | None, typer.Option(help="Longer responses are left out. [the model's limit]")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints, in OUT.part until the end.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a process reward model: cross-entropy at the steps' ends, right and wrong ones weighing the same. What is
    in --out then works as `--detector prm:DIR`, with the threshold that was best on the held-out problems."""
    try:
        if resume is not None:
            _check_alone(ctx)
            job, settings = _job_of(resume)
            _train(job, settings, resume, goes_on=True)
            return
        if not (files and base and out):
            raise fail("expected FILES, --model and --out, or --resume")
        settings = Settings(
            separator=separator, epochs=epochs, batch_size=batch_size, packing=packing, lr=lr, held_out=held_out,
            max_tokens=max_tokens, save_every=save_every, seed=seed, device=device,
        )  # fmt: skip
        _train(Job([str(file) for file in files], form, base), settings, out, goes_on=False)
    except ValueError as error:
        raise fail(str(error)) from None


class Job(NamedTuple):
    """What is trained on what; a run keeps it with its settings."""

    files: list[str]
    form: str
    base: str


def _job_of(out: Path) -> tuple[Job, Settings]:
    """Of a run that is to go on."""
    values = settings_of(out)
    try:
        job = Job(values["files"], values["form"], values["base"])
        if not isinstance(job.files, list) or not all(isinstance(text, str) for text in (*job.files, *job[1:])):
            raise TypeError("expected texts")
        return job, Settings(**values["settings"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        where = part_of(out) / "config.json"
        raise UsageError(f"--resume: {where} has settings that cannot work: {reason}") from None


def _check_alone(ctx: typer.Context) -> None:
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name != "resume" and source is not None and source.name == "COMMANDLINE":
            shown = {"base": "--model", "form": "--format", "files": "FILES"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"{shown}: cannot be given with --resume, which keeps the settings of the run")


def _train(job: Job, settings: Settings, out: Path, goes_on: bool) -> None:
    from prefixloss.detect.train_prm import train_prm  # noqa: PLC0415

    if job.form not in LABELLED:
        raise fail(f"--format: got {job.form!r}, expected one with labels: {', '.join(LABELLED)}")
    records = [record for file in job.files for record in records_of(Path(file), job.form, "markers")]
    try:
        with progress(None, "training") as tick:
            trained = train_prm(
                records, job.base, out, settings, begun=tick.expect, advance=lambda loss: tick(1), resume=goes_on,
                source={"files": job.files, "form": job.form},
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped{_to_go_on(out)}", err=True)
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
    except OSError as error:
        typer.echo(
            f"prefixloss: {visible(f'{error.filename or job.base}: {error.strerror or error}')}{_to_go_on(out)}",
            err=True,
        )
        raise typer.Exit(1) from None
    _report(trained, out)


def _to_go_on(out: Path) -> str:
    saved = (part_of(out) / "checkpoint.pt").exists()
    return visible(f"; to go on: prefixloss prm train --resume {out}") if saved else ""


def _report(trained: Any, out: Path) -> None:
    console = Console()
    table = Table(title=Text(visible(f"{out}, on held-out problems")), title_justify="left")
    for name in ("threshold", "F1", "exact, of those with an error", "false alarms, of those without"):
        table.add_column(name, justify="right")
    for threshold, scores in trained.by_threshold.items():
        shares = (scores.share_among("exact", correct=False), scores.share_among("false alarm", correct=True))
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        f1 = "-" if scores.f1 is None else f"{100 * scores.f1:.1f}"
        table.add_row(f"{threshold:g}{' *' if threshold == trained.threshold else ''}", f1, *cells)
    print_table(console, table)
    print_table(console, tables.reliability(f"prm:{out}", trained.by_threshold[trained.threshold]))
    left = f", {trained.left_out} too long or without steps" if trained.left_out else ""
    kept = f"kept after epoch {trained.best + 1}; {trained.padding:.0%} of what the model read was padding"
    console.print(visible(f"{trained.training} responses trained on{left}; {kept}"))
