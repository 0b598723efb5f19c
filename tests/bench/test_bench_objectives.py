"""The benchmark of a user's function and of sampling replay: what its rows compute, and that it writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from bench.commands import app
from bench.speed.inputs import Linear
from bench.speed.objectives import BASE, METHODS, kept_by_top_k

SHAPE = (16, 6, 1200)


def solved(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    data = Linear.random(torch.device("cpu"), SHAPE, 8, dtype=torch.float32)
    loss = METHODS[name](data)()
    assert loss is not None
    return loss, [x.grad for x in data.leaves if x.grad is not None]


def test_the_function_is_the_built_in_and_kept_sets_touch_their_own_columns_alone() -> None:
    loss, grads = solved(BASE)
    of_function, of_its = solved("a user's function")
    torch.testing.assert_close(of_function, loss)
    torch.testing.assert_close(of_its, grads)
    data = Linear.random(torch.device("cpu"), SHAPE, 8, dtype=torch.float32)
    kept = kept_by_top_k(data, 20)
    assert (kept == data.tokens[:, None]).any(1).all()
    _, (_, d_weight) = solved("20 kept ids")
    outside = torch.ones(SHAPE[2], dtype=torch.bool)
    outside[kept.unique()] = False
    assert bool(d_weight[kept.unique()].any())
    assert not bool(d_weight[outside].any())


def test_the_command_prints_and_writes_a_row_a_method(tmp_path: Path) -> None:
    path = tmp_path / "objectives.json"
    options = ["--head", "6x1200", "--tokens", "16", "--rounds", "1", "--threads", "1", "--json", str(path)]
    done = CliRunner().invoke(app, ["objectives", *options])
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(METHODS)
    assert all(row["seconds"] > 0 and row["method"] in done.output for row in rows.values())
    assert rows[BASE]["times_the_floor"] == 1
