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
    text = same.write(tmp_path, {"trl": records})
    assert (tmp_path / "same.md").read_text() == text
    assert json.loads((tmp_path / "same.json").read_text()) == {"trl": records}
    row = next(line for line in text.splitlines() if "weights at the end" in line)
    assert row.endswith("| 1.0e-01 | 3.0e-01 | 2.0e-01 ± 1.3e+00 |")  # 12.706 * 0.1414 / sqrt(2)


def test_a_trainer_that_is_not_run_keeps_its_records(tmp_path):
    records = [
        {"seed": seed, **same.difference(*[curves([1.0, 2.0], [0.5, 0.5], [1.0, 0.0], [3.0, 4.0])] * 2)}
        for seed in (0, 1)
    ]
    same.write(tmp_path, {"verl": records})
    text = same.write(tmp_path, {"trl": records})
    assert json.loads((tmp_path / "same.json").read_text()) == {"verl": records, "trl": records}
    assert text.index("## TRL") < text.index("## verl")
    assert len([line for line in text.splitlines() if line.startswith("| weights at the end")]) == 2


def test_a_trainer_that_is_missing_is_said_so(tmp_path, monkeypatch):
    def missing(package, first):
        raise ImportError(f"{package}: got none installed, expected it: pip install {package}")

    monkeypatch.setattr(commands.installed, "check_version", missing)
    for given, said in (
        (["--trainer", "verl"], "verl: got none installed"),
        ([], "got no trainer installed"),
        (["--trainer", "x"], "got 'x'"),
    ):
        done = CliRunner().invoke(commands.app, ["same", *given, "--out", str(tmp_path)], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert said in done.output
    assert not list(tmp_path.iterdir())


# of verl's loop the runs are short: what takes time is the import
BOUNDS = {
    # float32 sums of a few hundred terms in another order; later steps carry that on
    "trl": {"first_grad_norm": 1e-5, "grad_norm": 1e-3, "weights": 1e-2},
    # and 1e-6 more in the deviation that advantages are divided by, which is 0.5 or a little more
    "verl": {"first_grad_norm": 1e-5, "grad_norm": 1e-3, "weights": 1e-2},
}


@pytest.mark.parametrize("trainer", [pytest.param("trl", marks=pytest.mark.slow), "verl"])
def test_the_trainer_s_run_is_ours(trainer, tmp_path):
    pytest.importorskip(trainer)
    given = ["same", "--trainer", trainer, "--seeds", "2", "--steps", "6", "--workers", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(commands.app, given)
    assert done.exit_code == 0, done.output
    records = json.loads((tmp_path / "same.json").read_text())[trainer]
    assert len(records) == 2
    for record in records:
        assert record["moved"] > 1e-2
        assert record["same_samples"] == 6
        assert {name: record[name] for name in BOUNDS[trainer] if record[name] >= BOUNDS[trainer][name]} == {}
