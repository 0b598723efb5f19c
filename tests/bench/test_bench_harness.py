"""The benchmark's processes: turns, deaths, what is missing or does not fit, and the ratios of rounds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.speed import harness
from bench.speed.cases import Case, Head
from bench.speed.harness import Bench, GoneError, Limits, Peer, bench_on, quartiles, ratio, summarise
from bench.speed.methods import METHODS
from bench.speed.record import check, new_record
from bench.speed.settings import SETTINGS, credit_of

CASE = Case("custom", Head("16x64", 16, 64), 64, "float32", "dense")
BIG = Case("custom", Head("4096x65536", 4096, 65_536), 4096, "float32", "dense")
PATIENT = 600.0  # seconds that only a worker that hangs takes
FEW = ["floor", "ours", "naive", "picked"]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with bench_on("cpu", 1, Limits(rounds=2, turn_seconds=0.0), lambda _: None) as runner:
        runner.probe(["float32", "bfloat16"], CASE)
        yield runner


def by_name(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in case["rows"]}


def test_methods_take_turns_and_the_file_has_all_of_them(bench: Bench) -> None:
    told: list[str] = []
    bench.truths.clear()  # errors are measured once a head: another test may have been first
    bench.tell = told.append
    case = bench.run(CASE, FEW)
    bench.tell = lambda _: None
    rows = by_name(case)
    assert list(rows) == list(METHODS["hidden"])
    assert {name for name, row in rows.items() if row["status"] == "ok"} == set(FEW)
    assert rows["trl"]["status"] == "left out"
    for name in FEW:
        assert len(rows[name]["rounds"]["0"]["both"]) == 2
        assert rows[name]["repeats"]
        seconds = rows[name]["seconds"]["both"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert ("errors" in rows[name]) == (name != "floor")
    assert rows["ours"]["errors"]["d_weight"] < 1e-5
    # there and back: the last of a round is the first of the next
    turns = [text.split(", ")[-1] for text in told if "round" in text]
    assert turns[4:] == turns[:4][::-1]
    assert (case["learning_tokens"], case["learning_share"], case["padding_share"]) == (64, 1.0, 0.0)
    record = new_record("test", {"device": "cpu", "cpu": "x"}, 1, {})
    check({**record, "cases": [case]}, "record")


def test_errors_are_measured_once_a_head_and_dtype(bench: Bench) -> None:
    bench.truths.clear()
    bench.run(CASE, ["ours"])
    assert "errors" not in by_name(bench.run(CASE._replace(tokens=128), ["ours"]))["ours"]
    assert "errors" in by_name(bench.run(CASE._replace(dtype="bfloat16"), ["ours"]))["ours"]


@pytest.mark.parametrize("order", ["load", "warm", "turn"])
def test_a_killed_method_is_a_row_and_the_rest_goes_on(
    bench: Bench, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Peer.ask

    def ask_or_kill(self: Peer, do: str, seconds: float, **more: Any) -> dict[str, Any]:
        if self.name == "naive" and do == order:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
        return ask(self, do, seconds, **more)

    monkeypatch.setattr(Peer, "ask", ask_or_kill)
    rows = by_name(bench.run(CASE, FEW))
    assert (rows["naive"]["status"], rows["naive"]["why"]) == (
        "died", f"{order}: killed, most likely for want of memory"
    )  # fmt: skip
    assert all(rows[name]["status"] == "ok" and "seconds" in rows[name] for name in FEW if name != "naive")


def test_a_crash_is_told_with_its_signal(bench: Bench) -> None:
    with bench.peer(CASE, "ours") as peer:
        os.kill(peer.process.pid, signal.SIGSEGV)
        peer.process.join()
        with pytest.raises(GoneError, match="load: signal SIGSEGV") as raised:
            peer.ask("load", PATIENT)
    assert raised.value.status == "died"


class Dies:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGSEGV,)


def test_so_is_one_before_the_worker_s_first_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.worker, "serve", Dies())
    with bench.peer(CASE, "ours") as peer:
        peer.process.join()
        with pytest.raises(GoneError, match=r"^load: signal SIGSEGV$"):
            peer.ask("load", PATIENT)


def test_a_worker_that_takes_too_long_is_stopped(bench: Bench) -> None:
    with bench.peer(CASE, "ours") as peer:
        os.kill(peer.process.pid, signal.SIGSTOP)  # else it may have answered before it is asked whether it has
        with pytest.raises(GoneError, match="load took more than 0 s") as raised:
            peer.ask("load", 0)
        assert not peer.process.is_alive()
    assert raised.value.status == "too slow"


def test_a_worker_that_fails_says_why(bench: Bench, tmp_path: Path) -> None:
    with bench.peer(CASE, "ours") as peer, pytest.raises(GoneError, match=r"truth: .*nowhere") as raised:
        peer.ask("truth", PATIENT, file=str(tmp_path / "nowhere" / "file"))
    assert raised.value.status == "failed"


def test_workers_can_be_processes_of_their_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, whose driver outlives no fork
    monkeypatch.setattr(harness, "_context", lambda _: multiprocessing.get_context("spawn"))
    with bench.peer(CASE, "ours") as peer:
        assert peer.ask("load", PATIENT) == {}
        assert peer.ask("turn", PATIENT)["both"] > 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux counts what malloc gives against RLIMIT_DATA")
def test_memory_that_malloc_refuses_is_told_as_such(bench: Bench) -> None:
    case = CASE._replace(tokens=4096, head=Head("16x65536", 16, 65_536))
    with bench.peer(case, "naive") as peer:
        peer.order["memory"] = 2**30  # the logits alone are that large
        peer.ask("load", PATIENT)
        with pytest.raises(GoneError, match="allocate memory") as raised:
            peer.ask("warm", PATIENT)
    assert raised.value.status == "does not fit"


def test_what_is_not_installed_cannot_run_or_does_not_fit_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "trl" else True)
    credit, methods = credit_of(64, SETTINGS["neutral-prefix"]), METHODS["hidden"]
    known = bench._known
    assert known(methods["trl"], CASE, credit, 64) == {
        "status": "not installed", "why": 'trl is not installed: pip install "prefixloss[bench]"'
    }  # fmt: skip
    assert known(methods["liger"], CASE, credit, 64)["why"] == "takes one advantage a response, not one a token"
    assert known(METHODS["logits"]["liger"], CASE, credit, 64)["status"] == "cannot run"
    gemma = CASE._replace(head=Head("gemma", 16, 64, 30.0))
    assert known(methods["torch"], gemma, credit, 64)["why"] == "has no softcap"
    huge = known(methods["naive"], CASE._replace(head=BIG.head, tokens=2**20), credit, 2**20)
    # 2^20 x 65,536 logits at 8 bytes are 512 GiB
    assert huge["status"] == "does not fit"
    assert 512 < float(huge["why"].split()[3]) < 560
    slow = known(methods["ours"], BIG, credit, 4096)
    assert slow["status"] == ("too slow" if 3 * 4096 * 2**28 / bench.speeds["float32"] > 60 else "ok")


def test_a_call_over_the_limit_is_too_slow(bench: Bench) -> None:
    hasty = replace(bench, limits=replace(bench.limits, call_seconds=1e-6), speeds={"float32": 1e30})
    rows = by_name(hasty.run(CASE, ["floor", "ours"]))
    assert rows["ours"]["status"] == "too slow"
    assert rows["ours"]["why"] == "a call took 0 s, the limit is 0 s"


def test_inputs_that_do_not_fit_together_make_shifts_with_ours_in_each(bench: Bench) -> None:
    names = list(METHODS["hidden"])
    assert bench._shifts(CASE, names) == [[name for name in names if name != "ours"] + ["ours"]]
    shifts = bench._shifts(BIG, names)
    assert len(shifts) > 1
    assert all(shift[-1] == "ours" for shift in shifts)
    assert sorted(name for shift in shifts for name in shift[:-1]) == sorted(set(names) - {"ours"})
    assert bench._shifts(CASE, ["ours"]) == [["ours"]]


def rounds_of(name: str, by_shift: dict[str, list[float]]) -> dict[str, Any]:
    return {"method": name, "rounds": {shift: {"both": times} for shift, times in by_shift.items()}}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # 1/2, 4/4, 9/6: their median is 1, while the medians' ratio is 4/4 and the means' 14/12
    rows = [rounds_of("ours", {"0": [1.0, 4.0, 9.0]}), rounds_of("naive", {"0": [2.0, 4.0, 6.0]})]
    assert ratio(rows, "ours", "naive") == 1.0
    assert ratio(rows, "naive", "ours") == 1.0
    assert ratio([*rows, rounds_of("trl", {"0": [10.0, 40.0, 30.0]})], "ours", "trl") == 0.1


def test_a_ratio_is_taken_in_a_shift_that_both_worked_in() -> None:
    rows = [
        rounds_of("ours", {"0": [1.0], "1": [3.0]}),
        rounds_of("trl", {"1": [6.0]}),
        rounds_of("floor", {"0": [1.0]}),
    ]
    assert ratio(rows, "ours", "trl") == 0.5
    assert ratio(rows, "trl", "floor") is None
    assert ratio(rows, "ours", "nobody") is None


def test_bits_that_change_between_rounds_are_told() -> None:
    row: dict[str, Any] = {"shift": 0}
    turn = {"forward": 1.0, "backward": 2.0, "both": 3.0, "calls": 4}
    summarise(row, [{**turn, "bits": [1, 2]}, {**turn, "bits": [1, 3]}], 0)
    assert row["repeats"] is False
    assert row["seconds"]["both"] == {"low": 3.0, "median": 3.0, "high": 3.0}
    assert row["calls"] == 8


def test_quartiles_of_few_rounds() -> None:
    assert quartiles([2.0]) == {"low": 2.0, "median": 2.0, "high": 2.0}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}


def test_threads_and_scratch_files_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with bench_on("cpu", 3, Limits(), lambda _: None) as runner:
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert runner.scratch.is_dir()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not runner.scratch.exists()
