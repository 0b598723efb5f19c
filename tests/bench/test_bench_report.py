"""The benchmark's file, tables, pictures and command."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.commands import app
from bench.speed import table
from bench.speed.headline import headline
from bench.speed.record import FormatError, check, machine_line, new_record, read

ROOT = Path(__file__).parents[2]
METHODS = {"floor": 1.0, "ours": 1.1, "naive": 2.0, "trl": 4.0}


def row(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    parts = {"forward": seconds / 4, "backward": 3 * seconds / 4, "both": seconds}
    return {
        "method": name, "label": {"ours": "prefixloss", "naive": "PyTorch"}.get(name, name), "floor": name == "floor",
        "status": "ok", "why": "", "shift": 0, "repeats": True, "peak_bytes": int(seconds * 2**24),
        "rounds": {"0": {part: [value, value] for part, value in parts.items()}},
        "seconds": {part: {"low": 0.9 * value, "median": value, "high": 1.1 * value} for part, value in parts.items()},
        **more,
    }  # fmt: skip


def case(
    group: str, tokens: int = 1024, dtype: str = "float32", share: float = 1.0, start: str = "hidden"
) -> dict[str, Any]:
    errors = {"tokens": 64, "draws": 4, "loss": 1e-6, "logps": 1e-7, "d_hidden": 2e-6, "d_weight": 3e-6}
    rows = [row(name, tokens / 1e4 * factor * (share if factor < 2 else 1)) for name, factor in METHODS.items()]
    if group == "floor":
        rows = [{**r, **({} if r["floor"] else {"errors": errors})} for r in rows]
    rows.append({"method": "liger", "label": "Liger", "floor": False, "status": "died", "why": "warm: signal SIGSEGV"})
    rows.append({"method": "cce", "label": "CCE", "floor": False, "status": "left out", "why": "not asked for"})
    setting = f"solved-{round(100 - 100 * share)}" if group == "share" else "grpo"
    return {
        "name": f"{group} {tokens} {dtype} {share}", "group": group, "tokens": tokens, "dtype": dtype, "start": start,
        "head": {"name": "wide", "width": 1024, "vocabulary": 32768, "softcap": None}, "setting": setting,
        "learning_tokens": int(share * tokens), "learning_share": share, "input_bytes": 1, "rows": rows,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    made = new_record("prefixloss bench", {"device": "cpu", "cpu": "Some CPU"}, 2, {"rounds": 2})
    made["cases"] = [
        case("floor"), case("floor", dtype="bfloat16"), case("floor", start="logits"),
        *(case("length", tokens) for tokens in (1024, 2048, 4096)), *(case("share", share=s) for s in (0.25, 0.5, 1.0)),
    ]  # fmt: skip
    return made


@pytest.fixture
def file(record: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_record_is_read_back(file: Path, record: dict[str, Any]) -> None:
    assert read(file) == record
    assert machine_line(record) == "Some CPU, 2 threads"
    assert {"python", "torch", "prefixloss", "trl", "cut-cross-entropy"} <= set(record["versions"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "got schema 2, expected 1"),
        (("cases",), {}, "'cases' is dict, expected list"),
        (("machine", "threads"), None, "'threads' is NoneType, expected int"),
        (("cases", 0, "tokens"), "many", "a case: 'tokens' is str, expected int"),
        (("cases", 0, "rows", 0, "status"), "fine", "got status 'fine', expected one of ok, "),
        (("cases", 0, "rows", 0, "seconds"), 1.0, "'seconds' is float, expected dict"),
    ],
)
def test_a_file_of_another_kind_is_named(
    record: dict[str, Any], path: tuple[Any, ...], value: Any, message: str
) -> None:
    at: Any = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        check(record, "file")
    del at[path[-1]]
    with pytest.raises(FormatError, match=f"the key '{path[-1]}' is missing"):
        check(record, "file")


def test_tables_show_ratios_and_every_reason(record: dict[str, Any]) -> None:
    grid = next(table.grids(record))
    cells = {cells[0]: cells for cells in grid.rows}
    assert list(cells) == ["floor", "prefixloss", "PyTorch", "trl"]
    # ours / it, it / floor
    assert cells["PyTorch"][5:7] == ("0.55", "2.00")
    assert cells["prefixloss"][5:7] == ("", "1.10")
    assert cells["floor"][5:7] == ("1.10", "")
    assert grid.notes == ["Liger: died: warm: signal SIGSEGV", "left out: CCE"]
    errors = [grid for grid in table.grids(record) if "float64" in grid.title]
    assert len(errors) == 3
    assert errors[0].rows[0] == ("prefixloss", "1.0e-06", "1.0e-07", "2.0e-06", "3.0e-06")


def test_markdown_has_a_table_a_case(file: Path, record: dict[str, Any]) -> None:
    done = invoke("table", file, "--markdown")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "**wide (D 1,024, V 32,768), 1,024 tokens, float32, from hidden; grpo: 100.0% learn**"
    ratios = "ours / it | it / floor | peak, MiB | same bits"
    assert lines[2] == f"| method | forward, ms | backward, ms | both, ms | quartiles, ms | {ratios} |"
    assert lines[3] == "| --- |" + " ---: |" * 8
    assert sum(line.startswith("| method") for line in lines) == len(record["cases"]) + 3
    assert invoke("table", file).exit_code == 0


def test_a_summary_has_methods_down_and_cases_across(record: dict[str, Any]) -> None:
    floor, from_logits, length, share = table.summary(record)
    assert (
        floor.title == "Beside the floor: ms (times the floor). wide; D 1,024, V 32,768; 1,024 tokens; grpo: 100% learn"
    )
    assert floor.columns == ("method", "float32", "bfloat16")
    assert floor.rows[1] == ("prefixloss", "113 (1.10)", "113 (1.10)")
    assert floor.rows[-1] == ("Liger", "died", "died")
    assert floor.notes == ["Liger: warm: signal SIGSEGV", "left out (`--methods all` runs all): CCE"]
    assert from_logits.columns == ("method", "ms")
    assert length.columns == ("method", "1,024 tokens", "2,048 tokens", "4,096 tokens")
    # 2 x 0.1024 s; 0.2048 x 2^24 bytes
    assert length.rows[2] == ("PyTorch", "205, 3", "410, 7", "819, 13")
    assert share.columns[1:] == ("solved-75: 25% learn", "solved-50: 50% learn", "solved-0: 100% learn")


def test_a_summary_says_who_has_an_empty_cell(record: dict[str, Any]) -> None:
    cases = [case for case in record["cases"] if case["group"] == "share"]
    row = next(row for row in cases[0]["rows"] if row["method"] == "naive")
    row |= {"status": "left out", "why": "not asked for"}
    *_, share = table.summary(record)
    assert next(cells for cells in share.rows if cells[0] == "PyTorch")[1] == ""
    assert "left out of some columns (`--methods all` runs all): PyTorch" in share.notes


def test_the_summary_goes_between_the_marks_of_a_readme(file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    for _ in range(2):  # the second time changes nothing
        done = invoke("table", file, "--into", readme)
        assert done.exit_code == 0, done.output
        text = readme.read_text()
        assert text.startswith("before\n<!-- bench: begin -->\n**Beside the floor")
        assert text.endswith("`prefixloss bench`\n<!-- bench: end -->\nafter\n")
        assert "old" not in text
    readme.write_text("no marks")
    done = invoke("table", file, "--into", readme)
    assert done.exit_code == 2
    assert "does not have <!-- bench: begin -->" in done.output
    assert readme.read_text() == "no marks"


def test_three_figures_are_beside_pytorch(record: dict[str, Any], file: Path, tmp_path: Path) -> None:
    real = {**case("floor"), "group": "models"}
    next(r for r in real["rows"] if r["method"] == "naive")["errors"] = {"logps": 3e-7, "d_hidden": 8e-6, "loss": 1.0}
    record["cases"].append(real)
    assert headline(record).splitlines() == [
        # 1.1 x 0.25 of the floor of all tokens, PyTorch twice that floor; 0.4096 x 1.1 s and 2 x as many bytes
        "- **Time** beside PyTorch's: 0.14 where 25% of the tokens learn, 0.55 where 100% do "
        "(head wide, 1,024 tokens, float32)",
        "- **Memory** above the inputs at 4,096 tokens: 7 MiB, PyTorch 13",
        "- **Error**: log-probs and gradients are 3 to 4 times closer to float64 than PyTorch's (wide, float32)",
    ]
    file.write_text(json.dumps({**record, "cases": [made for made in record["cases"] if made["group"] == "length"]}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    assert invoke("table", file, "--figures", "--into", readme).exit_code == 0
    memory = invoke("table", file, "--figures").output
    assert memory.startswith("- **Memory**")
    assert readme.read_text() == f"before\n<!-- bench: begin -->\n{memory}<!-- bench: end -->\nafter\n"


@pytest.mark.parametrize(("name", "options"), [("README.md", ("--figures",)), ("bench/results/README.md", ())])
def test_the_projects_readmes_hold_what_the_record_says(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / name).read_text())
    done = invoke("table", ROOT / "bench/results/cpu.json", *options, "--into", copy)
    assert done.exit_code == 0, done.output
    assert copy.read_text() == (ROOT / name).read_text()


def test_pictures_are_drawn_from_the_file(file: Path, tmp_path: Path) -> None:
    done = invoke("plot", file, "--out", tmp_path / "pictures")
    assert done.exit_code == 0, done.output
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["errors.png", "floor.png", "length.png", "share.png"]
    for path in pictures:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        # twice the 800 pixels of a README
        assert struct.unpack(">I", head[16:20])[0] == 1600


def test_only_pictures_with_figures_are_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "few.json"
    path.write_text(json.dumps({**record, "cases": [case("length"), case("models")]}))
    done = invoke("plot", path, "--out", tmp_path / "pictures")
    assert done.exit_code == 0
    assert done.output == ""
    assert list((tmp_path / "pictures").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "qwen"), "--heads: got 'qwen', expected D x V"),
        (("--tokens", "1.5k"), "--tokens: got '1.5k', expected a number of tokens"),
        (("--dtypes", "int8"), "--dtypes: got 'int8', expected one of float32, bfloat16, float16"),
        (("--settings", "dapo"), "--settings: got 'dapo', expected one of dense, "),
        (("--starts", "logits"), "--starts: got 'logits' with the settings grpo"),
        (("--methods", "ours,theirs"), "--methods: got 'theirs', expected all, or some of floor, ours"),
        (("--sets", "floor,roof"), "--sets: got 'roof', expected one of floor, models, length, share"),
        (("--tokens", "1k", "--quick"), "--tokens: cannot be given with --quick"),
        (("--heads", "8x8", "--sets", "floor"), "--heads: cannot be given with --sets"),
        (("--tokens", "4"), "--tokens: got 4, expected at least 8"),
        (("--device", "tpu"), "--device: got 'tpu', expected cpu or cuda"),
        (("plot", "nowhere.json"), "cannot read nowhere.json: No such file"),
        (("table", __file__), "is not JSON"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert f"prefixloss: {message}" in done.output or message in done.output


def test_the_command_measures_writes_and_prints(tmp_path: Path) -> None:
    path = tmp_path / "new" / "small.json"
    command = [sys.executable, "-c", "from bench.commands import app; app()"]
    options = (
        "--heads 16x64 --tokens 64,128 --dtypes float32 --settings half-solved,vppo-relu --methods floor,ours,naive"
    )
    limits = f"--rounds 1 --turn-seconds 0 --threads 1 --memory 2 --json {path}"
    done = subprocess.run(
        [*command, *options.split(), *limits.split()], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read(path)
    assert [(c["tokens"], c["setting"]) for c in found["cases"]] == [
        (64, "half-solved"), (64, "vppo-relu"), (128, "half-solved"), (128, "vppo-relu")
    ]  # fmt: skip
    assert all(
        r["status"] == "ok" for c in found["cases"] for r in c["rows"] if r["method"] in ("floor", "ours", "naive")
    )
    assert found["limits"]["memory"] == 2 * 2**30
    assert found["machine"]["threads"] == 1
    assert "16x64 (D 16, V 64), 64 tokens" in done.stdout
    assert "Relative error against float64" in done.stdout


def test_cases_are_tracked_by_pytest_benchmark_and_not_by_the_ordinary_tests(tmp_path: Path) -> None:
    saved = tmp_path / "track.json"
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    options = ["bench/speed/test_speed.py", "-k", "quick and logits and floor", f"--benchmark-json={saved}"]
    # in a worker of pytest-xdist, whose variables the child would inherit, pytest-benchmark saves nothing
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*pytest_, *options], cwd=ROOT, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    (tracked,) = json.loads(saved.read_text())["benchmarks"]
    assert tracked["extra_info"]["method"] == "floor"
    assert tracked["stats"]["rounds"] == 5
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()
