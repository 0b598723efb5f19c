"""The `prefixloss` command. It needs the "rl" extra; importing `prefixloss` does not."""

from __future__ import annotations

import io
import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from prefixloss.detect.choose import EXPECTED
from prefixloss.detect.records import FormatError
from prefixloss.io.endpoint import UnansweredError
from prefixloss.io.files import write_whole
from prefixloss.io.lock import is_empty
from prefixloss.io.visible import visible
from prefixloss.maths.divergence import BY_NAME
from prefixloss.rl import UsageError
from prefixloss.rl.config import ADVANTAGES, DISTIL_FROM, DTYPES, GENERAL, TRACKERS, Config
from prefixloss.rl.reload import BY_NAME as RELOADS
from prefixloss.show import read_shown, to_html, to_terminal
from prefixloss.steps import SEGMENTERS


def missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    return f'prefixloss: this command needs the "rl" extra: pip install "prefixloss[rl]" (not installed: {package})'


try:
    import typer
    from rich.console import Console

    from prefixloss._bench import commands as bench
    from prefixloss.detect import commands as detect
    from prefixloss.detect import prm_commands as prm
except ModuleNotFoundError as error:
    if (error.name or "").startswith("prefixloss"):
        raise
    print(missing(error), file=sys.stderr)
    raise SystemExit(2) from None

app = typer.Typer(
    help="First-error-masked policy losses for RL on language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.add_typer(detect.app, name="detect")
app.add_typer(prm.app, name="prm")
app.add_typer(bench.app, name="bench")


def fail(message: str) -> typer.Exit:
    """One line on standard error; the exit code of a wrong argument."""
    typer.echo(f"prefixloss: {visible(message)}", err=True)
    return typer.Exit(2)


# options that are a number or a word
_MIXED = "shorten", "gradient_tolerance", "head_gradient_tolerance"


def option(name: str, text: str) -> Any:
    """An option of `Config`, its help with the default."""
    default = getattr(Config, name)
    general = GENERAL.get(name, default)
    if default is None:
        return typer.Option(help=text)
    return typer.Option(help=f"{text} [{default}{'' if general == default else f'; {general} with --model'}]")


@app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(help="New or empty directory for the run. [runs/DATE-TIME]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --out replace an earlier run.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Run to go on with, with its own settings.")] = None,
    # the policy and its problems
    model: Annotated[
        str | None, option("model", "Directory or hub name of a causal LM, instead of a tiny one.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Need the tokenizer's chat template, or leave it off. [used if it is there]"
        ),
    ] = None,
    data: Annotated[str | None, option("data", "JSON lines with question and answer, or a folder of them.")] = None,
    lora: Annotated[int | None, option("lora", "Rank of adapters to train in place of the weights.")] = None,
    dtype: Annotated[str | None, option("dtype", f"Of the products: {', '.join(DTYPES)}.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Compute layers again on the way back: time for memory."),
    ] = None,
    device: Annotated[str | None, option("device", "cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, option("threads", "CPU threads, 0: as many as PyTorch likes.")] = None,
    seed: Annotated[int | None, option("seed", "Of everything random.")] = None,
    timeout: Annotated[
        float | None,
        option("timeout", "Seconds to wait for a server's answer and, under torchrun, for the other processes."),
    ] = None,
    log_to: Annotated[str | None, option("log_to", f"Send the figures to {', '.join(TRACKERS)}, too.")] = None,
    # responses
    rollouts: Annotated[
        str | None, option("rollouts", "URL or MODEL@URL of an engine that samples, as vLLM's http://host:8000/v1.")
    ] = None,
    reload: Annotated[
        str | None, option("reload", f"How that engine is given new weights: {', '.join(RELOADS)}.")
    ] = None,
    prompts: Annotated[int | None, option("prompts", "Prompts an update.")] = None,
    group: Annotated[int | None, option("group", "Responses a prompt.")] = None,
    max_tokens: Annotated[int | None, option("max_tokens", "Longest response.")] = None,
    # credit
    advantage: Annotated[str | None, option("advantage", f"One of {', '.join(ADVANTAGES)}.")] = None,
    alpha: Annotated[float | None, option("alpha", "vppo: value of a good-prefix token.")] = None,
    flawed: Annotated[
        float | None,
        option("flawed", "vppo: search right answers too, and value one so from its first wrong step on."),
    ] = None,
    shorten: Annotated[
        str | None, option("shorten", 'vppo: tokens cut off the good prefix: "prompt", a number, or a share like 0.1.')
    ] = None,
    detector: Annotated[
        str | None, option("detector", f"Finds first wrong steps, instead of the built-in check: rollouts, {EXPECTED}.")
    ] = None,
    continuations: Annotated[
        int | None, option("continuations", "Continuations from each prefix, with --detector rollouts.")
    ] = None,
    threshold: Annotated[
        float | None, option("threshold", "A detector's finds with less confidence count as none.")
    ] = None,
    steps: Annotated[str | None, option("steps", f"How a detector's steps are cut: {', '.join(SEGMENTERS)}.")] = None,
    # a teacher
    teacher: Annotated[
        str | None,
        option("teacher", "Directory or hub name of a causal LM with the same tokenizer, or URL or MODEL@URL of one."),
    ] = None,
    teacher_top: Annotated[
        int | None, option("teacher_top", "Likeliest ids that a served teacher lists for a token.")
    ] = None,
    distill_from: Annotated[
        str | None, option("distill_from", f"Which tokens the teacher is asked about: {', '.join(DISTIL_FROM)}.")
    ] = None,
    distill_coef: Annotated[float | None, option("distill_coef", "Weight of what the teacher says.")] = None,
    divergence: Annotated[str | None, option("divergence", f"From the teacher: {', '.join(BY_NAME)}.")] = None,
    # optimisation
    updates: Annotated[int | None, option("updates", "Batches of responses to learn from.")] = None,
    epochs: Annotated[int | None, option("epochs", "Passes over the responses of an update.")] = None,
    minibatches: Annotated[int | None, option("minibatches", "Optimiser steps a pass.")] = None,
    micro_prompts: Annotated[
        int | None, option("micro_prompts", "Prompts at once in a training pass: bounds memory.")
    ] = None,
    lr: Annotated[float | None, option("lr", "Learning rate of AdamW.")] = None,
    lr_warmup: Annotated[int | None, option("lr_warmup", "Optimiser steps over which it rises to that.")] = None,
    clip: Annotated[float | None, option("clip", "The ratio's clip range, below and above 1.")] = None,
    kl_coef: Annotated[float | None, option("kl_coef", "Weight of the KL to the starting policy.")] = None,
    max_grad_norm: Annotated[float | None, option("max_grad_norm", "Gradients are clipped to this norm.")] = None,
    gradient_tolerance: Annotated[
        str | None,
        option(
            "gradient_tolerance",
            "Of the loss: a share of the gradient that may be left out, or auto.",
        ),
    ] = None,
    head_gradient_tolerance: Annotated[
        str | None, option("head_gradient_tolerance", "The head's own, or auto.")
    ] = None,
    # evaluation and checkpoints
    eval_every: Annotated[int | None, option("eval_every", "Updates between evaluations.")] = None,
    eval_problems: Annotated[int | None, option("eval_problems", "Held-out problems.")] = None,
    eval_samples: Annotated[int | None, option("eval_samples", "Responses a held-out problem.")] = None,
    k: Annotated[int | None, option("k", "Of pass@k.")] = None,
    save_every: Annotated[int | None, option("save_every", "Updates between checkpoints.")] = None,
    # the tiny model
    warm_steps: Annotated[int | None, option("warm_steps", "Most supervised steps before RL, tiny model only.")] = None,
    hidden_size: Annotated[int | None, option("hidden_size", "Of the tiny model.")] = None,
    layers: Annotated[int | None, option("layers", "Of the tiny model.")] = None,
) -> None:
    """Train a policy with credit up to its first error; without options a tiny one on generated arithmetic."""
    given = {
        name: value
        for name, value in ctx.params.items()
        if value is not None and name not in ("out", "resume", "overwrite")
    }
    try:
        from prefixloss.rl.optimise import NotFiniteError  # noqa: PLC0415
        from prefixloss.rl.report import Report  # noqa: PLC0415
        from prefixloss.rl.train import train as train_run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prefixloss"):
            raise
        print(missing(error), file=sys.stderr)
        raise typer.Exit(2) from None
    run: Path | None = None
    try:
        if resume is not None:
            run = resume
            _check_alone(given, out)
            config = Config.read(resume)
        else:
            given |= {name: _number(given[name]) for name in _MIXED if name in given}
            config = Config(**{**(GENERAL if model else {}), **given})
            if out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UsageError("--out: got None, expected a directory: under torchrun all processes share one")
            run = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
            if int(os.environ.get("RANK", "0")) == 0:
                _check_room(run, overwrite)
        train_run(config, run, Report(), overwrite=overwrite)
    except UsageError as error:
        raise fail(str(error)) from None
    except (NotFiniteError, UnansweredError) as error:
        kept = _kept(run) if isinstance(error, UnansweredError) else ""
        typer.echo(f"prefixloss: {visible(str(error))}{kept}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(
            f"prefixloss: {visible(f'{error.filename or run}: {error.strerror or error}')}{_kept(run)}", err=True
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            typer.echo(f"\nstopped{_to_go_on(run)}", err=True)
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None


def _to_go_on(run: Path | None) -> str:
    began = run is not None and (run / "config.json").exists()
    return visible(f"; to go on: prefixloss train --resume {run}") if began else ""


def _kept(run: Path | None) -> str:
    """What a run has that could not write."""
    kept = run is not None and (run / "checkpoint.pt").exists()
    return f"; the checkpoint from before is kept{_to_go_on(run)}" if kept else ""


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="JSON lines as `prefixloss detect` writes them; see the README.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page there instead.")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Responses to show. [all]")] = None,
) -> None:
    """Show responses: the good prefix green, what was trimmed grey, the first wrong step red."""
    try:
        records = read_shown(file)[:most]
    except FormatError as error:
        raise fail(str(error)) from None
    if html is None:
        to_terminal(records, Console())
        return
    try:
        write_whole(html, lambda page: page.write(to_html(records, file.name).encode()))
    except OSError as error:
        raise fail(f"--html: cannot write {html}: {error.strerror}") from None
    typer.echo(f"{len(records)} responses: {html}")


def _check_room(run: Path, overwrite: bool) -> None:
    """No run may land among other files; only what is a run by its config.json may be replaced."""
    if run.exists() and not (run.is_dir() and is_empty(run)):
        if not (run / "config.json").is_file():
            raise UsageError(f"--out: {run} is not an empty directory and not a run")
        if not overwrite:
            raise UsageError(f"--out: {run} holds a run; --resume {run} goes on with it, --overwrite replaces it")


def _check_alone(given: dict[str, Any], out: Path | None) -> None:
    extra = [*(["out"] if out else []), *given]
    if extra:
        name = extra[0].replace("_", "-")
        raise UsageError(f"--{name}: cannot be given with --resume, which keeps the settings of the run")


def _number(text: str) -> str | int | float:
    """'prompt' -> 'prompt', '3' -> 3, '0.1' -> 0.1; what is none of them is left for the check of its option."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no letter for it shows its number
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
