"""The kernels as real sm_90 code, without a GPU: other files' tests again, in `ptx_emulator` (see there for its model).

A process of its own for each share, since a process either interprets kernels or compiles them. The emulator raises on
a race, an access out of bounds, a divergent barrier; the tests themselves compare with float64.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefixloss.maths.divergence import BY_NAME

ROOT = Path(__file__).parents[2]
DEVICE_CODE = ROOT / "csrc_triton"
# what asks the compiler alone is the same without the emulator
FILES = [f"tests/kernels/test_{name}.py" for name in ("kernels", "distill_kernels", "entries", "tune")]
KERNELS = (*FILES, "-k", "not compile and not 64_bits")


def compiling() -> dict[str, str]:
    """The environment of a process that compiles kernels, and whose tensors are on the CPU even beside a GPU."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


def emulated(record: pytest.RecordProperty | Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs pytest on them under the emulator; its figures."""
    environment = compiling()
    report = folder / "figures.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "--emulate", "--figures", str(report), *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    figures = json.loads(report.read_text())
    assert figures["errors"] == {}
    assert figures["programs"] > 100
    line = next(line for line in run.stdout.splitlines() if line.startswith("emulated: "))
    record("emulated", line.removeprefix("emulated: "))
    return figures


def kernels() -> set[str]:
    """Every kernel of the package."""
    sources = (ast.parse(path.read_text()) for path in DEVICE_CODE.glob("*.py"))
    return {node.name for tree in sources for node in tree.body if getattr(node, "name", "").endswith("_kernel")}


def flags(kernel: str) -> dict[str, set[str]]:
    """The values that matter of each thing a kernel of rows is compiled for."""
    both = {"True", "False"}
    work = {
        "row_kernel": "aligned peeled softcap reference penalty indexed clear narrowed rescaled",
        "slice_kernel": "aligned peeled softcap reference indexed",
        "combine_kernel": "softcap reference indexed",
        "gradient_kernel": "aligned peeled softcap reference penalty indexed clear rescaled",
        "measure_kernel": "softcap reference penalty",
        "select_kernel": "aligned softcap reference penalty",
        "distill_kernel": "aligned softcap mixed listed chunk gradient narrowed rescaled",
    }[kernel]
    wanted = {f"WORK.{name}": both for name in work.split()}
    if kernel in ("measure_kernel", "select_kernel"):
        return wanted
    if kernel == "distill_kernel":
        return wanted | {"NAME": set(BY_NAME), "TILE": {"1", "32", "64"}, "grads": {"*fp32", "*fp16", "*bf16"}}
    if kernel != "row_kernel":
        return wanted | ({"SPLITS": {"4"}})
    return wanted | {"logits": {"*fp32"}, "grads": {"*fp32", "*fp16", "*bf16"}, "VECTOR": {"4", "8"}}


def test_the_kernels_tests_pass_as_machine_code_and_reach_every_kernel_and_flag(
    record_property: Any, tmp_path: Path
) -> None:
    """With errors in approximate instructions: no test depends on their bits."""
    figures = emulated(record_property, tmp_path, "--noise", "1", *KERNELS)
    assert kernels() <= set(figures["launches"])
    variants = set(figures["variants"])
    products = {"gather_kernel weight_ptr", "scatter_kernel matrix_ptr", "scatter_kernel total_ptr"}
    for kernel in kernels() - {"scale_kernel", *(name.split()[0] for name in products)}:
        wanted = {f"{kernel} {name}={value}" for name, values in flags(kernel).items() for value in values}
        assert wanted <= variants, sorted(wanted - variants)
    for kernel in {"scale_kernel x_ptr", *products}:
        assert {f"{kernel}={kind}" for kind in ("*fp32", "*bf16", "*fp16")} <= variants


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["0", "1", "2"])
@pytest.mark.parametrize(
    "file",
    [
        "kernels/test_kernels",
        "kernels/test_distill_kernels",
        "backends/test_distill_triton",
        "backends/test_operators",
        "backends/test_triton_backend",
        "integrations/test_training_tools",
    ],
)
def test_every_test_of_kernels_and_back_end_passes_as_machine_code(
    file: str, noise: str, record_property: Any, tmp_path: Path
) -> None:
    emulated(record_property, tmp_path, "--noise", noise, f"tests/{file}.py")


@pytest.mark.slow
def test_every_barrier_mask_and_address_matters_and_its_loss_is_noticed(record_property: Any) -> None:
    environment = compiling()
    program = Path(__file__).parents[1] / "ptx_mutants.py"
    run = subprocess.run(
        [sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert {result["kernel"] for result in results} == kernels()
    for result in results:
        kinds = [kind for kind, _ in result["missed"]]
        assert kinds == ["barrier removed"] * result["doubled"], result["missed"]
    made = [result["made"] for result in results]
    counts = {kind: sum(one.get(kind, 0) for one in made) for kind in made[0]}
    assert min(counts.values()) >= 30, counts
    record_property("emulated", f"breaks made and noticed: {counts}")
