"""`prefixloss train`: a wrong argument gets one line that names it, a missing package the extra; before any work."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.rl.config import GENERAL, Config
from prefixloss.rl.policy import tiny_policy
from prefixloss.rl.train import loss_config


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--advantage", "ppo"], "--advantage: got 'ppo', expected one of vppo, cliff, "),
        (["--updates", "-1"], "--updates: got -1, expected a whole number of at least 1"),
        (["--group", "1"], "--group: got 1, expected at least 2"),
        (["--prompts", "0"], "--prompts: got 0"),
        (["--minibatches", "33"], "--minibatches: got 33, expected at most --prompts, 32"),
        (["--max-tokens", "-5"], "--max-tokens: got -5"),
        (["--lr", "0"], "--lr: got 0.0, expected a number above 0"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--kl-coef", "-0.1"], "--kl-coef: got -0.1"),
        (["--clip", "inf"], "--clip: got inf"),
        (["--threshold", "1.5"], "--threshold: got 1.5, expected a number from 0 to 1"),
        (["--alpha", "2"], "--alpha: got 2.0, expected a number from 0 to 1"),
        (["--flawed", "2"], "--flawed: got 2.0, expected a number from 0 to 1"),
        (["--flawed", "0.5", "--advantage", "cliff"], "--flawed: got 0.5, expected --advantage vppo with it"),
        (["--shorten", "half"], "--shorten: got 'half'"),
        (["--shorten", "-1"], "--shorten: got -1"),
        (["--shorten", "1.5"], "--shorten: got 1.5"),
        (
            ["--gradient-tolerance", "some"],
            "--gradient-tolerance: got 'some', expected \"auto\" or a number of at least 0",
        ),
        (["--head-gradient-tolerance", "-1"], "--head-gradient-tolerance: got -1"),
        (["--gradient-tolerance", "inf"], "--gradient-tolerance: got inf"),
        (["--k", "9"], "--k: got 9, expected at most --eval-samples, 8"),
        (["--seed", "-3"], "--seed: got -3"),
        (["--threads", "-1"], "--threads: got -1"),
        (["--hidden-size", "12"], "--hidden-size: got 12, expected a multiple of 8"),
        (["--chat"], "--chat: got True, expected --model with it"),
        (["--no-chat"], "--chat: got False, expected --model with it"),
        (["--rollouts", "h:8000"], "--rollouts: expected URL or MODEL@URL with http://... or https://..."),
        (["--reload", "nccl"], "--reload: got 'nccl', expected one of vllm, vllm-lora, sglang"),
        (["--teacher-top", "0"], "--teacher-top: got 0, expected a whole number of at least 1"),
        (["--distill-from", "start"], "--distill-from: got 'start', expected one of first-error, wrong, all"),
        (["--distill-coef", "-1"], "--distill-coef: got -1.0"),
        (["--divergence", "kl"], "--divergence: got 'kl', expected one of reverse, forward, jsd"),
        (["--advantage", "none"], "--advantage: got 'none', expected --teacher with it"),
        (["--teacher", "empty"], "--teacher: cannot load 'empty' as a causal language model"),
        (["--detector", "rollouts,prm:empty"], "--detector: got 'rollouts,prm:empty', which cannot be loaded: "),
        (["--device", "tpu"], "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', expected"),
        (["--data", "d.jsonl"], "--data: got 'd.jsonl', expected --model with it"),
        (["--model", "m", "--data", "absent.jsonl"], "--data: cannot read absent.jsonl: No such file"),
        (["--model", "m", "--data", "bad.jsonl"], "--data: bad.jsonl, line 2: not JSON"),
        (["--model", "m", "--data", "one.jsonl"], "--data: one.jsonl has 1 different questions, expected at least 2"),
        (["--model", "empty"], "--model: cannot load 'empty' as a causal language model"),
        (["--out", "full"], "--out: full is not an empty directory and not a run"),
        (["--out", "full", "--overwrite"], "--out: full is not an empty directory and not a run"),
        (["--out", "bad.jsonl"], "--out: bad.jsonl is not an empty directory and not a run"),
        (["--out", "run"], "--out: run holds a run; --resume run goes on with it, --overwrite replaces it"),
        (["--out", "bad.jsonl/run"], "--out: cannot write to bad.jsonl/run: Not a directory"),
        (["--resume", "absent"], "--resume: absent is not a run"),
        (["--resume", "full"], "--resume: full is not a run"),
        (["--resume", "run", "--lr", "0.1"], "--lr: cannot be given with --resume"),
        (["--resume", "run", "--out", "new"], "--out: cannot be given with --resume"),
        (["--resume", "run"], "--resume: config.json has a value of the wrong type: updates: got 'many'"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_no_work(here, arguments, message):
    (here / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\nnonsense\n')
    (here / "one.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 2)
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("mine")
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text('{"updates": "many"}')
    before = sorted(here.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"prefixloss: {message}")
    assert result.stderr.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_a_number_that_is_none_is_refused_by_its_option(here):
    result = invoke("--group", "several")
    assert result.exit_code == 2
    assert "--group" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_gpu_that_is_not_there_is_refused(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: got 'cuda', expected cpu: PyTorch sees no GPU here" in invoke("--device", "cuda").stderr


def test_tolerances_reach_the_loss(here, monkeypatch):
    seen = []
    monkeypatch.setattr("prefixloss.rl.train.train", lambda config, run, report, overwrite: seen.append(config))
    result = invoke("--gradient-tolerance", "auto", "--head-gradient-tolerance", "0.001", "--out", "new")
    assert result.exit_code == 0, result.output
    (config,) = seen
    loss = loss_config(config, tiny_policy(16, 1), SimpleNamespace(logps=None))
    assert (loss.gradient_tolerance, loss.head_gradient_tolerance) == ("auto", 0.001)


@pytest.mark.parametrize(("text", "value"), [("prompt", "prompt"), ("3", 3), ("0.1", 0.1)])
def test_options_reach_the_run(here, monkeypatch, text, value):
    seen = []
    monkeypatch.setattr("prefixloss.rl.train.train", lambda config, run, report, overwrite: seen.append((config, run)))
    result = invoke("--shorten", text, "--lr", "0.5", "--eval-problems", "7", "--out", "new")
    assert result.exit_code == 0, result.output
    assert seen == [(Config(shorten=value, lr=0.5, eval_problems=7), Path("new"))]


def test_a_model_brings_other_defaults_which_options_still_override(here, monkeypatch):
    seen = []
    monkeypatch.setattr("prefixloss.rl.train.train", lambda config, run, report, overwrite: seen.append(config))
    invoke("--model", "m", "--group", "4")
    assert seen == [Config(**{**GENERAL, "model": "m", "group": 4})]


def test_overwrite_replaces_a_run_once_its_other_arguments_are_known_to_be_good(here):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text("{}")
    (here / "run" / "old").write_text("")
    assert invoke("--out", "run", "--overwrite", "--model", "absent", "--data", "absent").exit_code == 2
    assert (here / "run" / "old").exists()
    small = "--updates 1 --prompts 2 --group 2 --warm-steps 1 --eval-problems 2 --hidden-size 8 --layers 1"
    result = invoke("--out", "run", "--overwrite", *small.split())
    assert result.exit_code == 0, result.output
    assert not (here / "run" / "old").exists()
    assert "held-out pass@1" in result.stdout


def test_resume_reads_the_settings_of_the_run(here, monkeypatch):
    config = Config(seed=3, lr=0.25, advantage="rts")
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text(json.dumps(config.__dict__))
    seen = []
    monkeypatch.setattr("prefixloss.rl.train.train", lambda config, run, report, overwrite: seen.append((config, run)))
    assert invoke("--resume", "run").exit_code == 0
    assert seen == [(config, Path("run"))]


@pytest.mark.parametrize("package", ["typer", "transformers", "matplotlib"])
def test_without_the_extra_the_library_works_and_the_command_names_it(package):
    program = f"""
import sys
sys.modules[{package!r}] = None  # as if it were not installed
import prefixloss
print("imported", prefixloss.__version__, flush=True)
sys.argv = ["prefixloss", "train"]
from prefixloss.cli import main
main()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.startswith("imported")
    assert done.returncode == 2
    assert done.stderr == (
        f'prefixloss: this command needs the "rl" extra: pip install "prefixloss[rl]" (not installed: {package})\n'
    )
