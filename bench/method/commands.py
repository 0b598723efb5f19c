"""The method's own claims, at a size that a CPU can run: `python -m bench.method all`, then `... show`.

Results go to bench/results/method/: tree.json, runs.jsonl (a line a run; a second call goes on where the first
stopped), judge.json, the pictures, and results.md with the tables. `show` makes the last two from the JSON.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from prefixloss.integrations import installed
from prefixloss.io.files import write_whole

from . import judge as method_judge
from . import runs as method_runs
from . import same as method_same
from . import same_verl
from . import show as method_show
from . import tree as method_tree

DIRECTORY = Path(__file__).parents[1] / "results" / "method"
app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
# a run of each trainer, and the oldest version it is for
SAME = {"trl": (method_same.run, "1.9"), "verl": (same_verl.run, "0.9")}
Where = Annotated[Path, typer.Option(help="Directory of the results.")]


@app.command()
def tree(out: Where = DIRECTORY, runs: Annotated[int, typer.Option(help="Runs a depth.")] = 20) -> None:
    """Samples needed against depth, on the theorem's tree. Seconds."""
    record = method_tree.measure(runs)
    write_whole(out / "tree.json", lambda file: file.write((json.dumps(record) + "\n").encode()))


@app.command()
def train(
    experiments: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(method_runs.EXPERIMENTS)}. [all]")
    ] = None,
    out: Where = DIRECTORY,
    work: Annotated[Path, typer.Option(help="Where the warm starts are kept.")] = Path("runs/method"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, with a thread each.")] = 2,
) -> None:
    """Training runs of the comparisons, about a minute each; those already in runs.jsonl are not made again."""
    names = experiments or list(method_runs.EXPERIMENTS)
    for name in names:
        if name not in method_runs.EXPERIMENTS:
            raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(method_runs.EXPERIMENTS)}")
    path = out / "runs.jsonl"
    done = read_runs(path)
    have = {(run["key"], run["seed"]) for run in done}
    wanted = {
        (condition.key, seed): condition
        for name in names
        for condition in method_runs.EXPERIMENTS[name]
        for seed in range(method_runs.SEEDS[name])
    }
    todo = [(condition, seed) for (key, seed), condition in wanted.items() if (key, seed) not in have]
    work.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool, Progress(console=Console(stderr=True)) as progress:
        seeds = sorted({seed for _, seed in todo})
        if any(condition.taught for condition, _ in todo):
            pool.submit(method_runs.teacher, work).result()
        if any(condition.judged for condition, _ in todo):
            pool.submit(method_runs.trained_judge, work).result()
        starts = dict(zip(seeds, pool.map(method_runs.warm, seeds, [work] * len(seeds)), strict=True))
        bar = progress.add_task("runs", total=len(todo))
        for finished in as_completed([pool.submit(method_runs.run, c, seed, starts[seed]) for c, seed in todo]):
            done.append(finished.result())
            write_runs(path, done)
            progress.advance(bar)


@app.command()
def judge(
    out: Where = DIRECTORY,
    work: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("runs/method"),
) -> None:
    """Judges beside the exact check: rollouts, and what was trained on their labels. Minutes."""
    for directory in (work, out):
        directory.mkdir(parents=True, exist_ok=True)
    model, writer = method_runs.teacher(work), method_runs.writer(work)
    record = method_judge.measure(work, model, writer, method_runs.WRITER)
    write_whole(out / "judge.json", lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))


def read_runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    ordered = sorted(runs, key=lambda run: (run["key"], run["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write("".join(json.dumps(run) + "\n" for run in ordered).encode()))


@app.command()
def show(out: Where = DIRECTORY) -> None:
    """Tables and pictures from what was measured."""
    judges = out / "judge.json"
    text = method_show.write(
        out,
        json.loads((out / "tree.json").read_text()),
        read_runs(out / "runs.jsonl"),
        json.loads(judges.read_text()) if judges.exists() else None,
    )
    print(text)


@app.command()
def same(
    out: Where = DIRECTORY,
    trainers: Annotated[
        list[str] | None, typer.Option("--trainer", help=f"Of {', '.join(SAME)}. [those installed]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each loss.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Of a run.")] = 200,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with a thread each.")] = 2,
) -> None:
    """A trainer's own loss beside ours in the same runs; needs the extra "trl" or "verl". Minutes."""
    records = {}
    for name in trainers or list(SAME):
        if name not in SAME:
            raise typer.BadParameter(f"--trainer: got {name!r}, expected one of {', '.join(SAME)}")
        run, first = SAME[name]
        try:
            installed.check_version(name, first)
        except ImportError as missing:
            if trainers:
                raise typer.BadParameter(str(missing)) from missing
            typer.echo(f"{missing}; what is in {out} of it stays", err=True)
        else:
            records[name] = method_same.measure(run, seeds, steps, workers)
    if not records:
        raise typer.BadParameter("got no trainer installed, expected one of " + ", ".join(SAME))
    print(method_same.write(out, records))


@app.command("all")
def everything(out: Where = DIRECTORY, workers: Annotated[int, typer.Option(min=1)] = 2) -> None:
    """All of it."""
    tree(out)
    train(None, out, workers=workers)
    judge(out)
    show(out)
