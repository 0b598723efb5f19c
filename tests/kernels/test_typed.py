"""The kernels' package as type checkers and editors see it: `prefixloss/_kernels` is a link to `csrc_triton`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = """
import torch
from prefixloss._kernels.problem import Problem
from prefixloss._kernels.rows import launch_slices
from prefixloss._kernels.scale import launch_scale


def calls(problem: Problem, x: torch.Tensor) -> None:
    launch_slices(problem, x)
    launch_slices(problem, 1.0)
    launch_slices(x, x)
    launch_scale(x)
"""


def test_the_link_leads_to_the_kernels() -> None:
    link = ROOT / "prefixloss/_kernels"
    if not link.is_symlink():
        pytest.skip("checked out without symbolic links")
    assert link.resolve() == ROOT / "csrc_triton"
    assert not link.readlink().is_absolute()


@pytest.mark.slow
def test_a_wrong_call_of_a_launcher_is_a_type_error(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    wrong = [line.split(":")[1] for line in said.splitlines() if "error" in line and "calls.py" in line]
    assert wrong == ["10", "11", "12"], said
