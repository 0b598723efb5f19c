"""Runs methods against each other: a process each, one at a time, in turns.

The methods of a case wait in processes of their own, and a round gives each of them a turn, so that a change in the
machine's speed hits all. Inputs that do not fit into memory together make several shifts, and our method takes part in
each. What cannot run, does not fit or dies is a row with the reason; the rest goes on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import worker
from .cases import Case
from .methods import METHODS, OURS, Method
from .settings import Credit, credit_of, setting_of

GIB = 2**30
PARTS = ("forward", "backward", "both")
# what a process holds on its device on top of its inputs: torch, a CUDA context
BASE = {"cpu": 2**28, "cuda": 2**29}
# what chunked methods may hold beside their gradients
CHUNKS = 2**28
# a first call may compile
COMPILE_SECONDS = 300.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """rounds: at most. case_seconds: no round of a case begins later, from the third on. call_seconds: of one call.
    turn_seconds: how long a turn repeats a short call. memory: bytes for all workers together, on their device."""

    rounds: int = 5
    case_seconds: float = 30.0
    call_seconds: float = 60.0
    turn_seconds: float = 3.0
    memory: int = 14 * GIB


class GoneError(Exception):
    """A worker that gives no answer. status: what its row says."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Peer:
    """A worker, seen from its parent."""

    def __init__(self, name: str, order: dict[str, Any], log: Path) -> None:
        self.name, self.order, self.log = name, order, log
        context = _context(order["device"])
        log.touch()  # a worker may die before it writes a line
        self.line, end = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(end, str(log)), daemon=True)
        self.process.start()
        end.close()

    def ask(self, do: str, seconds: float, **more: Any) -> dict[str, Any]:
        """Its answer; a GoneError where it fails, dies or takes longer than that."""
        try:
            self.line.send({**self.order, **more, "do": do})
            if not self.line.poll(seconds):
                self.close()
                raise GoneError("too slow", f"{do} took more than {seconds:.0f} s")
            answer: dict[str, Any] = self.line.recv()
        except (EOFError, ConnectionError):
            raise GoneError("died", self._epitaph(do)) from None
        if "error" in answer:
            self.close()
            raise GoneError("does not fit" if answer["memory"] else "failed", f"{do}: {answer['error']}")
        return answer

    def _epitaph(self, do: str) -> str:
        self.process.join(60)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return f"{do}: killed, most likely for want of memory"
        cause = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{do}: {cause}" + (f": {lines[-1][:160]}" if lines else "")

    def close(self) -> None:
        self.line.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _context(device: str) -> Any:
    """Forked from a process that has loaded the libraries and computed nothing; CUDA wants new processes instead."""
    if device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", f"{__package__}.preload"])
    return context


# What can be known before a method runs


def missing(method: Method) -> str | None:
    """Why it is not installed."""
    if method.needs is None or importlib.util.find_spec(method.needs[1]):
        return None
    return f'{method.needs[0]} is not installed: pip install "prefixloss[bench]"'


def refusal(method: Method, case: Case, credit: Credit, device: str) -> str | None:
    """Why it cannot run here, or None."""
    if method.gpu_only and device == "cpu":
        return method.gpu_only
    if not method.by_token and credit.by_response is None:
        return "takes one advantage a response, not one a token"
    if not method.softcap and case.head.softcap:
        return "has no softcap"
    return None


def input_bytes(case: Case) -> int:
    """Leaves of one worker."""
    size = 2 if case.dtype != "float32" else 4
    if case.start == "logits":
        return 2 * size * case.tokens * case.head.vocabulary
    return size * (case.tokens * case.head.width + case.head.entries)


def least_bytes(method: Method, case: Case, rows: int) -> int:
    """The least that a call holds above its inputs: its gradients, and what it needs of [N, V]."""
    whole = int(method.whole * rows * case.head.vocabulary)
    if method.floor or case.start == "logits":
        return whole
    return whole + input_bytes(case)


def least_seconds(method: Method, case: Case, rows: int, speed: float) -> float:
    return method.products * rows * case.head.entries / speed


# Running


@dataclass
class Bench:
    """Where, how long and how large; scratch files; whom to tell what is going on.

    speeds: multiply-adds a second by dtype. truths: files of float64 answers, by head, dtype and start.
    """

    device: str
    threads: int
    limits: Limits
    scratch: Path
    tell: Callable[[str], None]
    speeds: dict[str, float] = field(default_factory=dict)
    truths: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def order(self, case: Case) -> dict[str, Any]:
        return {
            "case": case.as_json(), "device": self.device, "threads": self.threads, "memory": self.limits.memory,
            "turn_seconds": self.limits.turn_seconds,
        }  # fmt: skip

    @contextmanager
    def peer(self, case: Case, name: str) -> Iterator[Peer]:
        peer = Peer(name, {**self.order(case), "method": name}, self.scratch / f"{name}.log")
        try:
            yield peer
        finally:
            peer.close()

    def probe(self, dtypes: list[str], case: Case) -> dict[str, Any]:
        """The machine, and its speeds; a GoneError where not even that works."""
        with self.peer(case, "probe") as peer:
            answer = peer.ask("probe", COMPILE_SECONDS, dtypes=dtypes)
        self.speeds = answer["speeds"]
        machine: dict[str, Any] = answer["machine"]
        return machine

    def run(self, case: Case, names: list[str]) -> dict[str, Any]:
        """The case as the file has it: what learns, and a row a method, also of those not in `names`."""
        setting = setting_of(case.setting)
        credit = credit_of(case.tokens, setting)
        learning = int(credit.learning(setting).sum())
        methods = METHODS[case.start]
        rows: dict[str, Row] = {
            name: {"method": name, "label": methods[name].label, "floor": methods[name].floor} for name in methods
        }
        for name in rows:
            asked = name in names
            left_out = {"status": "left out", "why": "not asked for"}
            rows[name] |= self._known(methods[name], case, credit, learning) if asked else left_out
        runnable = [name for name, row in rows.items() if row["status"] == "ok"]
        errors = self._truth(case) if runnable else None
        for number, shift in enumerate(self._shifts(case, runnable)):
            self._run_shift(case, shift, rows, number, errors)
        padded = len(credit.lengths) * int(credit.lengths.max())
        return {
            **case.as_json(), "learning_tokens": learning, "learning_share": learning / case.tokens,
            "responses": len(credit.lengths), "padding_share": 1 - case.tokens / padded, "setting_text": setting.text,
            "input_bytes": input_bytes(case), "rows": list(rows.values()),
        }  # fmt: skip

    def _known(self, method: Method, case: Case, credit: Credit, learning: int) -> Row:
        """Status and reason, before anything runs."""
        if why := missing(method):
            return {"status": "not installed", "why": why}
        if why := refusal(method, case, credit, self.device):
            return {"status": "cannot run", "why": why}
        rows = learning if method.skips else case.tokens
        needed = BASE[self.device] + input_bytes(case) + least_bytes(method, case, rows)
        if needed > self.limits.memory:
            why = f"needs at least {needed / GIB:.1f} GiB of {self.limits.memory / GIB:.1f}"
            return {"status": "does not fit", "why": why}
        seconds = least_seconds(method, case, rows, self.speeds[case.dtype])
        if seconds > self.limits.call_seconds:
            return {"status": "too slow", "why": self._too_long(f"takes at least {seconds:.0f}")}
        return {"status": "ok", "why": ""}

    def _truth(self, case: Case) -> str | None:
        """The file to compare with: one a head, dtype and start, for the first case that has them."""
        key = (case.head, case.dtype, case.start)
        if key in self.truths:
            return None
        self.truths[key] = str(self.scratch / f"truth-{len(self.truths)}.pt")
        self.tell(f"{case.head.name}, {case.dtype}: float64")
        try:
            with self.peer(case, "truth") as peer:
                peer.ask("truth", COMPILE_SECONDS, file=self.truths[key])
        except GoneError as error:
            self.tell(f"no float64 reference: {error}")
            return None
        return self.truths[key]

    def _shifts(self, case: Case, names: list[str]) -> list[list[str]]:
        """Methods whose inputs fit together with the neediest one's call; ours is in each."""
        if not names:
            return []
        held = input_bytes(case) + BASE[self.device]
        least = {name: least_bytes(METHODS[case.start][name], case, case.tokens) for name in names}
        most = input_bytes(case) + CHUNKS + max(least.values())
        # a floor's results stay where they are from turn to turn
        most += sum(size for name, size in least.items() if METHODS[case.start][name].floor)
        room = max(2, (self.limits.memory - most) // held)
        others = [name for name in names if name != OURS]
        ours = [OURS] if OURS in names else []
        size = max(1, room - len(ours))
        return [others[at : at + size] + ours for at in range(0, len(others), size)] or [ours]

    def _run_shift(self, case: Case, names: list[str], rows: dict[str, Row], number: int, truth: str | None) -> None:
        """Rounds of these methods; `rows` gets what came out. Ours keeps its first shift's figures, all its rounds."""
        with ExitStack() as stack:
            peers: dict[str, Peer] = {}
            for name in names:
                again = "shift" in rows[name]
                self.tell(f"{case.name}: {rows[name]['label']} warms up")
                peer = stack.enter_context(self.peer(case, name))
                rows[name] |= {"status": "ok", "why": ""}
                with self._row(rows[name]):
                    peer.ask("load", self._first_limit())
                    warmed = peer.ask("warm", self._first_limit())
                    if warmed["call_seconds"] > self.limits.call_seconds:
                        raise GoneError("too slow", self._too_long(f"took {warmed['call_seconds']:.0f}"))
                    if not again:
                        rows[name] |= {"shift": number, **warmed}
                        if truth and not rows[name]["floor"]:
                            rows[name] |= peer.ask("errors", COMPILE_SECONDS, file=truth)
                    peers[name] = peer
            turns = self._rounds(case, peers, rows)
        for name, answers in turns.items():
            if answers:
                summarise(rows[name], answers, number)

    def _too_long(self, so_long: str) -> str:
        return f"a call {so_long} s, the limit is {self.limits.call_seconds:.0f} s"

    def _first_limit(self) -> float:
        return COMPILE_SECONDS + self.limits.call_seconds

    def _rounds(self, case: Case, peers: dict[str, Peer], rows: dict[str, Row]) -> dict[str, list[dict[str, Any]]]:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
        until = time.monotonic() + self.limits.case_seconds
        for turn in range(self.limits.rounds):
            if turn > 1 and time.monotonic() > until:
                break
            # there and back, so that nobody always follows the same rival
            for name in list(peers)[:: -1 if turn % 2 else 1]:
                self.tell(f"{case.name}: round {turn + 1}, {rows[name]['label']}")
                with self._row(rows[name]):
                    turns[name].append(peers[name].ask("turn", 2 * self.limits.call_seconds))
                if rows[name]["status"] != "ok":
                    del peers[name]
        return turns

    @contextmanager
    def _row(self, row: Row) -> Iterator[None]:
        try:
            yield
        except GoneError as error:
            row |= {"status": error.status, "why": str(error)}


def summarise(row: Row, answers: list[dict[str, Any]], shift: int) -> None:
    """Rounds of a shift into the row: every time, its quartiles, and whether all calls gave the same bits."""
    rounds = {part: [answer[part] for answer in answers] for part in PARTS}
    row.setdefault("rounds", {})[str(shift)] = rounds
    if row["shift"] == shift:
        row["seconds"] = {part: quartiles(times) for part, times in rounds.items()}
        same = all(answer["bits"] == answers[0]["bits"] for answer in answers)
        row["repeats"] = same and row.get("repeats", True)
        row["calls"] = sum(answer["calls"] for answer in answers)


def quartiles(times: list[float]) -> dict[str, float]:
    if len(times) == 1:
        return {"low": times[0], "median": times[0], "high": times[0]}
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def ratio(rows: list[Row], mine: str, base: str, part: str = "both") -> float | None:
    """mine / base: the median of the rounds' ratios, in a shift that has both; None where there is none."""
    by_name = {row["method"]: row.get("rounds", {}) for row in rows}
    for shift, rounds in by_name.get(base, {}).items():
        if theirs := by_name.get(mine, {}).get(shift):
            pairs = zip(theirs[part], rounds[part], strict=False)
            return statistics.median(a / b for a, b in pairs if b > 0) if rounds[part] else None
    return None


@contextmanager
def bench_on(
    device: str, threads: int, limits: Limits, tell: Callable[[str], None], names: Iterable[str] = ()
) -> Iterator[Bench]:
    """Scratch files and the workers' environment, for as long as it lasts. names: methods that will run."""
    given = {"OMP_NUM_THREADS": str(threads), "PREFIXLOSS_BENCH_METHODS": ",".join(names)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        with tempfile.TemporaryDirectory(prefix="prefixloss-bench-") as scratch:
            yield Bench(device, threads, limits, Path(scratch), tell)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
