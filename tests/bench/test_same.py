"""Same loss, same run: what differs is computed as said, and TRL's run is ours from the first step on."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bench.method import commands, same


def curves(norms, losses, rewards, end):
    logs = [{"loss": x, "grad_norm": n, "reward": r} for x, n, r in zip(losses, norms, rewards, strict=True)]
    return same.Curves(logs, torch.zeros(2), torch.tensor(end), 1.0)


def test_differences_of_two_runs_by_hand():
    theirs = curves([0.0, 2.0, 4.0], [0.0, 0.5, -1.0], [1.0, 0.5, 0.25], [3.0, 4.0])
    ours = curves([0.0, 2.2, 4.0], [0.0, 0.5, -0.9], [1.0, 0.5, 0.5], [3.0, 4.5])
    got = same.difference(theirs, ours)
    assert got["same_samples"] == 2
    assert got["first_grad_norm"] == pytest.approx(1 - 2 / 2.2)
    assert (got["grad_norm"], got["grad_norm_median"]) == pytest.approx((0.1, 0.05))  # of 0.1 and 0
    assert got["loss"] == pytest.approx(0.1)
    assert got["loss_size"] == pytest.approx(0.5)
    assert got["weights"] == pytest.approx(0.5 / 5)
    assert same.difference(theirs, theirs)["same_samples"] == 3


def test_the_page_has_a_column_a_seed_and_the_interval(tmp_path):
    one = same.difference(*[curves([1.0, 2.0], [0.5, 0.5], [1.0, 0.0], [3.0, 4.0])] * 2)
    records = [{"seed": 0, **one, "weights": 0.1}, {"seed": 1, **one, "weights": 0.3}]
    text = same.write(tmp_path, records)
    assert (tmp_path / "same.md").read_text() == text
    assert json.loads((tmp_path / "same.json").read_text()) == records
    row = next(line for line in text.splitlines() if "weights at the end" in line)
    assert row.endswith("| 1.0e-01 | 3.0e-01 | 2.0e-01 ± 1.3e+00 |")  # 12.706 * 0.1414 / sqrt(2)


@pytest.mark.slow
def test_trls_run_is_ours(tmp_path):
    pytest.importorskip("trl")
    given = ["same", "--seeds", "2", "--steps", "6", "--workers", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(commands.app, given)
    assert done.exit_code == 0, done.output
    for record in json.loads((tmp_path / "same.json").read_text()):
        assert record["moved"] > 1e-2
        assert record["same_samples"] == 6
        # float32 sums of a few hundred terms in another order; later steps carry that on
        assert record["first_grad_norm"] < 1e-5
        assert record["grad_norm"] < 1e-3
        assert record["weights"] < 1e-2
