"""`prefixloss bench`: is it faster, smaller and more exact than what you use, on this machine?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from prefixloss.io.files import write_whole

from .files import write_json
from .speed import distill as distillation
from .speed import objectives as of_objectives
from .speed import record as records
from .speed import worker
from .speed.cases import (
    DTYPES,
    Case,
    count_of,
    custom_cases,
    default_cases,
    dtype_of,
    head_of,
    methods_for,
    quick_cases,
)
from .speed.clock import Clock
from .speed.harness import GIB, Bench, GoneError, Limits, bench_on
from .speed.headline import headline
from .speed.inputs import Linear
from .speed.methods import NAMES
from .speed.own_model import QUANTILES, TOLERANCES, density, entropies, take
from .speed.own_model import measure as measure_own
from .speed.record import FormatError, Record
from .speed.table import grids, in_turns, kept_entries, made_on, markdown, of_model, show, show_grid

app = typer.Typer(
    help="Time, memory and error of prefixloss beside PyTorch, TRL, Liger, Cut Cross-Entropy and bare products.",
    rich_markup_mode=None,
    add_completion=False,
)
QUICK = Limits(rounds=2, case_seconds=5.0, call_seconds=10.0, turn_seconds=0.2)
WIDTH = 120
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def listed(values: str) -> str:
    return f"Comma-separated: {values}"


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    heads: Annotated[
        str | None, typer.Option(help=listed("qwen3-0.6b, llama-3-8b, ..., or D x V: 1024x32768."))
    ] = None,
    tokens: Annotated[str | None, typer.Option(help=listed("2048, 16k, 1m. [2048]"))] = None,
    dtypes: Annotated[str | None, typer.Option(help=listed("float32, bfloat16, float16. [bfloat16]"))] = None,
    settings: Annotated[
        str | None,
        typer.Option(help=listed("dense, grpo, vppo-relu, neutral-prefix, half-solved, solved-PERCENT. [grpo]")),
    ] = None,
    starts: Annotated[str | None, typer.Option(help=listed("hidden, logits (setting dense only). [hidden]"))] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: a causal LM's own head, by directory or hub name, on --data.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help='Its responses: JSON lines of "problem", and "response" or "steps".')
    ] = None,
    methods: Annotated[str | None, typer.Option(help=listed(f"{', '.join(NAMES)}; or all. [a choice by set]"))] = None,
    sets: Annotated[
        str | None, typer.Option(help=listed("of the default: floor, models, length, share. [all]"))
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of half an hour.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="At most. [5, with --quick 2]")] = None,
    case_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="No round of a case begins later, from the third on. [30, with --quick 5]"),
    ] = None,
    call_seconds: Annotated[float | None, typer.Option(min=0.1, help="Longest call. [60, with --quick 10]")] = None,
    turn_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long a turn repeats a short call. [3, with --quick 0.2]")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB for all workers. [14, or 80 % of what is free if less]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [cuda where there is one]")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write everything there, after each case.")
    ] = None,
) -> None:
    """Run the benchmark; the sub-commands draw and print a file that `--json` wrote."""
    if context.invoked_subcommand is not None:
        return
    where = _device(device)
    if model is not None or data is not None:
        _check_alone(context, ("model", "data", "tokens", "dtypes", "rounds", "threads", "device", "json_file"))
        _own(
            model, data, _tokens(tokens or "2048"), dtypes or "float32,bfloat16", rounds or 5, threads, where, json_file
        )
        return
    chosen = {"heads": heads, "tokens": tokens, "dtypes": dtypes, "settings": settings, "starts": starts}
    cases = _cases(chosen, sets, quick, where)
    only = _methods(methods)
    given = {"rounds": rounds, "case_seconds": case_seconds, "call_seconds": call_seconds, "turn_seconds": turn_seconds}
    base = asdict(QUICK if quick else Limits()) | {name: value for name, value in given.items() if value is not None}
    limits = Limits(**{**base, "memory": int(memory * GIB) if memory else _free(where)})
    console = wide_console()
    names = {case: only or methods_for(case, quick) for case in cases}
    used = dict.fromkeys(name for some in names.values() for name in some)
    with _telling() as tell, bench_on(where, threads, limits, tell, used) as runner:
        try:
            _run(runner, names, json_file, console)
        except GoneError as error:
            raise _fail(f"cannot compute on {where}: {error}") from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _tokens(text: str) -> int:
    try:
        return count_of(text)
    except ValueError as error:
        raise _fail(f"--tokens: {error}") from None


def _check_alone(context: typer.Context, taken: tuple[str, ...]) -> None:
    """Only options that `taken` names were given."""
    for name, value in context.params.items():
        if name not in taken and value not in (None, False):
            raise _fail(f"--{name.replace('_', '-')}: cannot be given with --model and --data")


def _own(
    model: str | None, data: Path | None, tokens: int, dtypes: str, rounds: int, threads: int, device: str,
    json_file: Path | None,
) -> None:  # fmt: skip
    """A model's own density and times, a table a dtype."""
    if model is None or data is None:
        raise _fail(f"--{'data' if data is None else 'model'}: needed with --{'model' if data is None else 'data'}")
    if device != "cpu":
        raise _fail(f"--device: got {device}, expected cpu with --model")
    try:
        chosen = [dtype_of(text, "--dtypes") for text in dtypes.split(",")]
        taken = take(model, data, tokens)
    except ValueError as error:
        raise _fail(str(error)) from None
    torch.set_num_threads(threads)
    console = wide_console()
    (count, width), vocabulary = taken.hidden.shape, len(taken.weight)
    quantiles = torch.quantile(entropies(taken), torch.tensor(QUANTILES)).tolist()
    pairs = ", ".join(f"{q:.0%}: {x:.2g}" for q, x in zip(QUANTILES, quantiles, strict=True))
    console.print(f"D {width:,}, V {vocabulary:,}, {count:,} tokens; entropy in nats, quantiles {pairs}", markup=False)
    kept = density(taken, TOLERANCES)
    show_grid(kept_entries(kept), console)
    command = " ".join(["prefixloss", *sys.argv[1:]])
    machine = {**worker.machine(torch.device(device)), "threads": threads}
    record: dict[str, Any] = {
        "made": records.now(), "command": command, "machine": machine, "versions": records.versions(),
        "shape": {"tokens": count, "width": width, "vocabulary": vocabulary},
        "entropy": dict(zip(map(str, QUANTILES), quantiles, strict=True)), "kept": kept, "times": {},
    }  # fmt: skip
    for dtype in chosen:
        rows = record["times"][dtype] = measure_own(taken, getattr(torch, dtype), rounds, Clock(torch.device(device)))
        show_grid(of_model(rows, f"Forward and backward, {dtype}"), console)
    console.print(made_on(record), markup=False)
    if json_file:
        _write(json_file, record)


def _run(runner: Bench, names: dict[Case, list[str]], json_file: Path | None, console: Console) -> None:
    """Every case with the methods named for it."""
    cases = list(names)
    machine = runner.probe(sorted({case.dtype for case in cases}), cases[0])
    command = " ".join(["prefixloss", *sys.argv[1:]])
    record = records.new_record(command, machine, runner.threads, asdict(runner.limits))
    for case in cases:
        record["cases"].append(runner.run(case, names[case]))
        show_grid(next(grids({**record, "cases": record["cases"][-1:]})), console)
        if json_file:
            _write(json_file, record)
    for grid in list(grids(record))[len(cases) :]:
        show_grid(grid, console)
    console.print(made_on(record), markup=False)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="What `prefixloss bench --json` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the pictures.")] = Path("."),
) -> None:
    """Draw time and memory against length, time against the learning share, errors, and the distance from the floor."""
    try:
        from .speed.plot import draw  # noqa: PLC0415 (needs matplotlib)
    except ModuleNotFoundError as error:
        raise _fail(f'plot needs matplotlib: pip install "prefixloss[bench]" ({error.name} is not installed)') from None
    record = _read(file)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in draw(record, out):
            typer.echo(path)
    except OSError as error:
        raise _fail(f"--out: cannot write into {out}: {error.strerror}") from None


@app.command()
def table(
    file: Annotated[Path, typer.Argument(help="What `prefixloss bench --json` wrote.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
    short: Annotated[bool, typer.Option("--summary", help="A table a set instead.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Three lines instead: time, memory, error.")] = False,
    into: Annotated[
        Path | None, typer.Option(help=f"Put the summary or figures between {BEGIN} and {END} in that file, a README.")
    ] = None,
) -> None:
    """Print a file's tables."""
    record = _read(file)
    if into is not None:
        _put(into, headline(record) if figures else markdown(record, short=True))
    elif figures:
        typer.echo(headline(record), nl=False)
    elif as_markdown:
        typer.echo(markdown(record, short), nl=False)
    else:
        show(record, wide_console(), short)


HeadOption = Annotated[str, typer.Option(help="D x V, or a model's head by its name.")]
TokensOption = Annotated[str, typer.Option(help="2048, 16k, ...")]
DtypeOption = Annotated[str, typer.Option(help=", ".join(DTYPES))]
RoundsOption = Annotated[int, typer.Option(min=1, help="Turns of each method.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda. [cuda where there is one]")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")]


@app.command()
def distill(
    head: HeadOption = "wide", tokens: TokensOption = "2048", dtype: DtypeOption = "float32", rounds: RoundsOption = 5,
    threads: ThreadsOption = 2, device: DeviceOption = None, json_file: JsonOption = None,
) -> None:  # fmt: skip
    """Distillation beside plain PyTorch, TRL's and Liger's: times in turns, and a call's peak memory."""

    def rows(where: torch.device, count: int, width: int, vocabulary: int) -> list[dict[str, Any]]:
        data = distillation.Pair.random(where, count, width, vocabulary, getattr(torch, dtype))
        return distillation.measure(data, rounds, Clock(where))

    _in_turns("Distillation", "floor", rows, (head, tokens, dtype), threads, device, json_file)


@app.command()
def objectives(
    head: HeadOption = "wide", tokens: TokensOption = "2048", dtype: DtypeOption = "float32", rounds: RoundsOption = 5,
    threads: ThreadsOption = 2, device: DeviceOption = None, json_file: JsonOption = None,
) -> None:  # fmt: skip
    """A function of the caller's own, and sampling replay, beside the built-in loss over the whole vocabulary."""

    def rows(where: torch.device, *shape: int) -> list[dict[str, Any]]:
        data = Linear.random(where, shape, 8, dtype=getattr(torch, dtype))  # type: ignore[arg-type]
        return of_objectives.measure(data, rounds, Clock(where))

    _in_turns("Objectives", "whole", rows, (head, tokens, dtype), threads, device, json_file)


def _in_turns(
    what: str, base: str, measured: Callable[..., list[dict[str, Any]]], shape: tuple[str, str, str], threads: int,
    device: str | None, json_file: Path | None,
) -> None:  # fmt: skip
    """measured: from device, N, D and V to rows, with times beside `base`. shape: head, tokens and dtype as given."""
    try:
        head, count = head_of(shape[0]), count_of(shape[1])
    except ValueError as error:
        raise _fail(f"--head or --tokens: {error}") from None
    try:
        dtype = dtype_of(shape[2], "--dtype")
    except ValueError as error:
        raise _fail(str(error)) from None
    torch.set_num_threads(threads)
    where = torch.device(_device(device))
    rows = measured(where, count, head.width, head.vocabulary)
    show_grid(in_turns(rows, f"{what}: {head.name}, {count:,} tokens, {dtype}", base), wide_console())
    if json_file:
        _write(json_file, {"head": head._asdict(), "tokens": count, "dtype": dtype, "threads": threads, "rows": rows})


def _put(path: Path, text: str) -> None:
    """Between the marks; nothing is written where they are not there."""
    try:
        before, _, rest = path.read_text().partition(BEGIN)
        _, mark, after = rest.partition(END)
        if not mark:
            raise _fail(f"--into: {path} does not have {BEGIN} and then {END}")
        write_whole(path, lambda file: file.write(f"{before}{BEGIN}\n{text}{END}{after}".encode()))
    except OSError as error:
        raise _fail(f"--into: cannot write {path}: {error.strerror}") from None


def wide_console() -> Console:
    """As wide as a row, also where the terminal is not."""
    console = Console()
    return console if console.width >= WIDTH else Console(width=WIDTH)


def _device(given: str | None) -> str:
    found = torch.cuda.is_available()
    device = given or ("cuda" if found else "cpu")
    if device not in ("cpu", "cuda"):
        raise _fail(f"--device: got {device!r}, expected cpu or cuda")
    if device == "cuda" and not found:
        raise _fail("--device: got cuda, but PyTorch finds no CUDA device")
    return device


def _cases(chosen: dict[str, str | None], sets: str | None, quick: bool, device: str) -> list[Case]:
    given = {name: value for name, value in chosen.items() if value is not None}
    if given and (sets or quick):
        raise _fail(
            f"--{next(iter(given))}: cannot be given with {'--sets' if sets else '--quick'}, which has its own cases"
        )
    try:
        if given:
            return _custom({"tokens": "2048", "dtypes": "bfloat16", "settings": "grpo", "starts": "hidden", **given})
        cases = quick_cases() if quick else default_cases(device)
        groups = dict.fromkeys(case.group for case in cases)
        wanted = sets.split(",") if sets else list(groups)
        for name in wanted:
            if name not in groups:
                raise ValueError(f"--sets: got {name!r}, expected one of {', '.join(groups)}")
    except ValueError as error:
        raise _fail(str(error)) from None
    return [case for case in cases if case.group in wanted]


def _custom(given: dict[str, str]) -> list[Case]:
    def parsed(option: str, parse: Callable[[str], Any]) -> list[Any]:
        try:
            return [parse(part.strip()) for part in given[option].split(",")]
        except ValueError as error:
            raise ValueError(f"--{option}: {error}") from None

    given = {"heads": "qwen3-0.6b", **given}
    names = (parsed(option, str) for option in ("dtypes", "settings", "starts"))
    return custom_cases(parsed("heads", head_of), parsed("tokens", count_of), *names)


def _methods(text: str | None) -> list[str]:
    names = [] if text is None else list(NAMES) if text == "all" else text.split(",")
    for name in names:
        if name not in NAMES:
            raise _fail(f"--methods: got {name!r}, expected all, or some of {', '.join(NAMES)}")
    return names


def _free(device: str) -> int:
    """Bytes that the workers may use together, where nobody said."""
    if device == "cuda":
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = Limits.memory
    return min(Limits.memory, int(0.8 * free))


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """One line on standard error that says what is going on."""
    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)


def _read(file: Path) -> Record:
    try:
        return records.read(file)
    except FormatError as error:
        raise _fail(str(error)) from None


def _write(path: Path, record: Any) -> None:
    try:
        write_json(path, record)
    except OSError as error:
        raise _fail(f"--json: cannot write {path}: {error.strerror}") from None


def _fail(message: str) -> typer.Exit:
    typer.echo(f"prefixloss: {message}", err=True)
    return typer.Exit(2)
