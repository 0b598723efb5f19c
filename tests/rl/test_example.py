"""examples/loop.py runs as it stands, and its five steps are those of the training loop."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from prefixloss.rl import train
from prefixloss.rl.config import Config
from prefixloss.rl.policy import tiny_policy
from prefixloss.rl.task import Problem

FILE = Path(__file__).parents[2] / "examples" / "loop.py"
PROBLEM = Problem("(7+5)*3=?", "36", ("Step 1: 7+5=12", "Step 2: 12*3=36", "Answer: 36"))
TEXTS = [
    PROBLEM.solution,
    "Step 1: 7+5=12\nStep 2: 12*3=37\nAnswer: 37",
    "Step 1: 7+5=13\nStep 2: 13*3=39\nAnswer: 39",
    "Step 1: 7+5=12\nAnswer: 36",
] * 2


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("example_loop", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_loop"] = module
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(monkeypatch, capsys):
    arguments = ["--updates", "2", "--warm-steps", "3", "--held-out", "4"]
    monkeypatch.setattr(sys, "argv", [str(FILE), *arguments])
    runpy.run_path(str(FILE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "after the warm start", "update 1", "update 2", "after 2 updates",
    ]  # fmt: skip
    assert not any("nan" in line for line in lines)


def test_its_credit_and_gradient_are_those_of_the_training_loop(loop):
    torch.manual_seed(0)
    policy = tiny_policy(16, 1)
    problems = [PROBLEM] * len(TEXTS)
    sampled = policy.written([PROBLEM.question] * len(TEXTS), TEXTS)
    batch = loop.Batch(sampled.ids, sampled.attention, sampled.mask)
    correct = loop.check(problems, TEXTS)
    errors = loop.find(policy.tokenizer, problems, batch, TEXTS, correct)
    checked = train.judge(Config(), policy, problems, sampled)
    assert correct == checked.correct.tolist()
    assert errors == checked.first_error.tolist()
    assert {e >= 0 for e in errors} == {True, False}
    credit = loop.weigh(batch, correct, errors)
    expected = train.weigh(Config(), checked, sampled, torch.zeros(len(TEXTS), dtype=torch.int64))
    for got, want in zip(credit, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(loop.hidden_of(policy.model, batch), policy.hidden(sampled), rtol=0, atol=0)


def test_an_update_makes_right_answers_likelier(loop):
    torch.manual_seed(0)
    policy = tiny_policy(16, 1)
    sampled = policy.written([PROBLEM.question] * len(TEXTS), TEXTS)
    batch = loop.Batch(sampled.ids, sampled.attention, sampled.mask)
    problems = [PROBLEM] * len(TEXTS)
    correct = loop.check(problems, TEXTS)
    credit = loop.weigh(batch, correct, loop.find(policy.tokenizer, problems, batch, TEXTS, correct))

    def logp_of_right():
        logps = train.logps_of(policy, sampled, [torch.arange(len(TEXTS))])
        return float(logps[0].sum() - logps[1].sum())  # beside a wrong one

    before = logp_of_right()
    loop.update(policy.model, torch.optim.SGD(policy.model.parameters(), lr=0.5), batch, credit)
    assert logp_of_right() > before + 1e-3
