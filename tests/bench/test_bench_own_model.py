"""The benchmark on a model's own head: what is taken of it, the density of its gradient, and a row a method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.commands import app
from bench.speed import own_model
from bench.speed.own_model import EXACT, FLOOR, Taken, density, gradient_of, methods, response_of, take
from bench.speed.policy_like import policy_like
from prefixloss.detect.records import Record
from prefixloss.rl.policy import tiny_policy

LINES = [
    {"problem": "1+2=?", "response": "Step 1: 1+2=3\nAnswer: 3"},
    {"problem": "2*3+1=?", "steps": ["Step 1: 2*3=6\n", "Step 2: 6+1=7\n", "Answer: 7"]},
    {"problem": "9-4=?", "steps": ["Step 1: 9-4=5", "Answer: 5"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny")
    policy = tiny_policy(16, 1)
    with torch.no_grad():
        policy.weight.mul_(40)  # sure of some tokens
    policy.save(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_the_states_are_those_that_predict_the_responses(model: Path, data: Path) -> None:
    whole = take(str(model), data, 10**6)
    tokens, lengths = whole.tokens, whole.lengths
    texts = ["Step 1: 1+2=3\nAnswer: 3", "Step 1: 2*3=6\nStep 2: 6+1=7\nAnswer: 7", "Step 1: 9-4=5\nAnswer: 5"]
    policy = tiny_policy(16, 1)
    written = policy.written([str(line["problem"]) for line in LINES], texts)
    assert tokens.tolist() == written.tokens[written.mask].tolist()
    assert lengths.tolist() == written.mask.sum(1).tolist()
    policy.model.load_state_dict(_state(model))
    torch.testing.assert_close(whole.hidden, policy.hidden(written)[written.mask].detach())
    few = take(str(model), data, int(lengths[0]) + 3)
    assert few.lengths.tolist() == [int(lengths[0]), 3]
    assert torch.equal(few.hidden, whole.hidden[: len(few.hidden)])


def _state(model: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(model).state_dict()
    return state


def test_steps_are_put_together_as_they_were() -> None:
    def record(**source: object) -> Record:
        return Record("p", list(source.get("steps", [])), None, None, dict(source))  # type: ignore[call-overload]

    assert response_of(record(response="a\nb")) == "a\nb"
    assert response_of(record(steps=["a\n", "b"])) == "a\nb"
    assert response_of(record(steps=["a", "b"])) == "a\nb"
    assert response_of(record(steps=["a. ", "b."])) == "a. b."


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_gradient_is_that_of_the_log_probs(softcap: float | None) -> None:
    formula = policy_like(24, 16, 50)
    data = Taken(formula.hidden.double(), formula.weight.double(), formula.tokens, torch.tensor([24]), softcap)
    logits = (data.hidden @ data.weight.T).requires_grad_()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    capped.log_softmax(1).gather(1, data.tokens[:, None]).sum().backward()
    # entries down to 1e-12 of the largest
    torch.testing.assert_close(gradient_of(data, slice(None)), logits.grad, rtol=1e-9, atol=1e-14)


def test_density_counts_what_the_bound_keeps() -> None:
    formula = policy_like(64, 32, 300)
    data = Taken(*formula, torch.tensor([64]))
    gradient = gradient_of(Taken(formula.hidden.double(), formula.weight.double(), *data[2:]), slice(None))
    squares, order = gradient.square().sort(dim=1)
    for row in density(data, (0.3, 2.0**-6)):
        budget = row["tolerance"] ** 2 * squares.sum() / 64
        stays = (squares.cumsum(1) > budget).gather(1, order.argsort(1))
        # an entry at the bound may fall to either side by rounding
        assert row["kept"] == pytest.approx(float(stays.double().mean()), abs=3 / stays.numel())
        assert row["rows_with_none"] == pytest.approx(float((~stays.any(1)).double().mean()), abs=1 / 64)
        assert row["head_rows"] == pytest.approx(float(stays.any(0).double().mean()), abs=3 / 300)
        left_out = (squares.sum() - gradient[stays].square().sum()).sqrt() / squares.sum().sqrt()
        assert row["left_out"] == pytest.approx(float(left_out), rel=1e-2)


def test_the_command_prints_and_writes_what_it_found(model: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    options = ["--model", str(model), "--data", str(data), "--rounds", "1", "--threads", "1", "--dtypes", "float32"]
    with pytest.MonkeyPatch.context() as patched:
        every = methods(31)
        quick = {name: every[name] for name in every if name in (FLOOR, "PyTorch") or name.startswith(EXACT)}
        patched.setattr(own_model, "methods", lambda _: quick)
        done = CliRunner().invoke(app, [*options, "--json", str(path)])
    assert done.exit_code == 0, done.output
    record = json.loads(path.read_text())
    assert record["shape"] == {"tokens": 37, "width": 16, "vocabulary": 31}
    assert [row["tolerance"] for row in record["kept"]] == list(own_model.TOLERANCES)
    rows = {row["method"]: row for row in record["times"]["float32"]}
    assert list(rows) == list(quick)
    assert rows[FLOOR]["times_the_floor"] == 1
    assert "d_hidden" not in rows[FLOOR]
    for name in list(rows)[1:]:
        # float32 sums of 37 and 31 terms; a tolerance of bfloat16's rounding
        limit = 1e-5 if name in (EXACT, "PyTorch") else 2e-3
        assert 0 < rows[name]["d_hidden"] < limit
        assert 0 < rows[name]["d_weight"] < limit
    assert "entropy in nats" in done.output
    assert "rows with none" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "--data: needed with --model"),
        (["--data", "d"], "--model: needed with --data"),
        (["--model", "m", "--data", "d", "--heads", "wide"], "--heads: cannot be given with --model and --data"),
        (["--model", "m", "--data", "d", "--quick"], "--quick: cannot be given with --model and --data"),
        (["--model", "m", "--data", "d", "--tokens", "x"], "--tokens: got 'x'"),
        (["--model", "m", "--data", "d", "--dtypes", "int8"], "--dtypes: got 'int8'"),
        (["--model", "m", "--data", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_wrong_arguments_of_it_are_named(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*options, "--device", "cpu"])
    assert done.exit_code == 2
    assert message in done.output


def test_a_model_that_cannot_be_loaded_is_named(data: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--model", str(tmp_path), "--data", str(data)])
    assert done.exit_code == 2
    assert "--model: cannot load" in done.output
