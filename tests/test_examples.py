"""Every example runs as it stands, on a tiny model; `loop.py` has tests of its own."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_here() -> None:
    known = {"distill.py", "find_errors.py", "fsdp2.py", "loop.py", "objective.py", "tour.ipynb"}
    known |= {"transformers_lora.py", "trl_vppo.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == known


def test_distill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("distill.py", monkeypatch, "--steps", "12")
    divergence = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert divergence[-1] < 0.6 * divergence[0]


def test_find_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 13", "Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 12"]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps({"problem": "(2 + 2) * 3", "response": x}) + "\n" for x in texts))
    run("find_errors.py", monkeypatch, str(file), "--out", str(tmp_path / "found"))
    assert capsys.readouterr().out.endswith("no error found: 1\nstep 2: 1\n")
    assert (tmp_path / "found.html").read_text().count('class="why"') == 2


def test_objective(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("objective.py", monkeypatch, "--steps", "20")
    rewards = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert rewards[-1] > rewards[0] + 0.2


def test_transformers_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    run("transformers_lora.py", monkeypatch, "--steps", "2")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("ratio at most 1.000")
    assert not second.endswith("ratio at most 1.000")  # the weights moved


def test_trl_vppo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    run("trl_vppo.py", monkeypatch, "--steps", "1")
    assert "grad_norm" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")
@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2(processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable]), str(EXAMPLES / "fsdp2.py"), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["step 0", "step 1"]


def test_the_notebook_runs_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["first_error"].tolist() == [-1, 20, 0, -1]
    assert namespace["model"].lm_head.weight.grad.abs().sum() > 0
