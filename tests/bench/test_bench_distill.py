"""The benchmark of distillation: everybody computes the same loss, and a row says what was measured or why not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.commands import app
from bench.speed.distill import FLOOR, METHODS, POLICY, Pair

NEEDS = {"TRL": "trl", "Liger": "liger_kernel"}


@pytest.mark.parametrize("name", [name for name in METHODS if "ids" not in name and name not in (FLOOR, POLICY)])
def test_methods_compute_one_loss_and_its_gradients(name: str) -> None:
    who, _, divergence = name.partition(", ")
    if who in NEEDS and not importlib.util.find_spec(NEEDS[who]):
        pytest.skip(f"{NEEDS[who]} is not installed")
    data = Pair.random(torch.device("cpu"), 16, 12, 40, torch.float32)
    loss = METHODS[name](data)()
    got = [x.grad.clone() for x in data.leaves if x.grad is not None]
    data.hidden.grad = data.weight.grad = None
    plain = METHODS[f"PyTorch, {divergence}"](data)()
    # float32 sums of 40 terms of size 1
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for g, leaf in zip(got, data.leaves, strict=True):
        torch.testing.assert_close(g, leaf.grad, rtol=1e-4, atol=1e-6)


def test_the_command_prints_and_writes_a_row_a_method(tmp_path: Path) -> None:
    path = tmp_path / "distill.json"
    options = ["--head", "12x40", "--tokens", "16", "--rounds", "1", "--threads", "1", "--json", str(path)]
    done = CliRunner().invoke(app, ["distill", *options])
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(METHODS)
    for name in (FLOOR, POLICY, "prefixloss, reverse", "PyTorch, jsd"):
        assert rows[name]["seconds"] > 0
        assert name in done.output
    assert rows[FLOOR]["times_the_floor"] == 1


def test_wrong_arguments_of_it_are_named() -> None:
    for option, value, message in (
        ("--head", "x", "got 'x', expected D x V"),
        ("--dtype", "int8", "--dtype: got 'int8'"),
    ):
        done = CliRunner().invoke(app, ["distill", option, value])
        assert done.exit_code == 2
        assert message in done.output
