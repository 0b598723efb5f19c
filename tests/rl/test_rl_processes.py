"""The training loop on several processes: the same update, files by the first one alone, resuming on another number
of them, and an end in bounded time where one dies or hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import group_of, in_processes
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.io import checkpoint
from prefixloss.io.lock import Lock
from prefixloss.rl import task, train
from prefixloss.rl.config import Config
from prefixloss.rl.optimise import State, Stepper
from prefixloss.rl.policy import Policy, tiny_policy
from prefixloss.rl.rollouts import Sampled
from prefixloss.rl.start import frozen
from prefixloss.rl.team import Team

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")

SMALL = {
    "--prompts": 4, "--group": 2, "--minibatches": 2, "--eval-problems": 4, "--eval-samples": 2, "--k": 2,
    "--eval-every": 2, "--save-every": 1, "--warm-steps": 20, "--hidden-size": 16, "--layers": 1, "--max-tokens": 24,
}  # fmt: skip


# one update

QUESTIONS = [task.Problem(f"{a}+5=?", str(a + 5), (f"Step 1: {a}+5={a + 5}", f"Answer: {a + 5}")) for a in range(2, 6)]
ENDS = ("Step 1: {q}={r}\nAnswer: {r}", "Step 1: {q}={r}\nAnswer: 9", "Step 1: {q}=1\nAnswer: 1")


def written(policy: Policy, questions: list[str], _: int) -> Sampled:
    """In place of sampling: the responses of a question do not depend on the process."""
    texts = []
    for number, question in enumerate(questions):
        q = question.removesuffix("=?")
        texts.append(ENDS[number % 3].format(q=q, r=int(q[0]) + 5))
    return policy.written(questions, texts)


def updated(team: Team, monkeypatch: pytest.MonkeyPatch, advantage: str) -> tuple[torch.Tensor, dict[str, float]]:
    monkeypatch.setattr(Policy, "sample", written)
    config = Config(prompts=4, group=3, minibatches=1, epochs=2, kl_coef=0.1, advantage=advantage, micro_prompts=2)
    torch.manual_seed(0)
    policy = tiny_policy(16, 1)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
    stepper = Stepper(config, policy.model, optimizer, State(step=100), team)
    metrics = train.learn(config, policy, frozen(policy), stepper, team.share(QUESTIONS))
    return torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach(), metrics


def same_update(rank: int, size: int, file: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        alone = {name: updated(Team(), patch, name) for name in ("vppo", "grpo")}
        with group_of(rank, size, file):
            for name, (parameters, metrics) in alone.items():
                got, got_metrics = updated(Team(rank, size), patch, name)
                # sums of float32 gradients in another order, after two steps
                torch.testing.assert_close(got, parameters, rtol=1e-4, atol=1e-5)
                assert got_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-6)
            start = torch.nn.utils.parameters_to_vector(tiny_policy(16, 1).model.parameters())
            assert not torch.allclose(start, parameters, atol=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_take_the_same_step_as_one(size: int, tmp_path: Path) -> None:
    in_processes(same_update, size, tmp_path)


def test_shares_are_all_there_is_in_order() -> None:
    for size in (1, 2, 3, 5):
        shares = [Team(rank, size).share(list(range(7))) for rank in range(size)]
        assert [item for share in shares for item in share] == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# whole runs


def launch(processes: int) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--shutdown-timeout=5"]


def command(processes: int, *arguments: Any) -> list[str]:
    return [*launch(processes), "-m", "prefixloss.cli", "train", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(processes: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )


def flags(**more: Any) -> list[Any]:
    chosen = {**SMALL, **{f"--{name.replace('_', '-')}": value for name, value in more.items()}}
    return [word for pair in chosen.items() for word in pair]


def updates_of(path: Path) -> list[int]:
    lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
    return [json.loads(line)["update"] for line in lines]


@pytest.mark.slow
def test_a_run_on_two_processes_writes_once_and_goes_on_on_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    done = run(2, *flags(updates=2, out=path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("held-out pass@1 ") == 3  # two evaluations and the table's line
    assert updates_of(path) == [0, 1, 2]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "updates": 3}))
    resumed = CliRunner().invoke(cli.app, ["train", "--resume", str(path)])
    assert resumed.exit_code == 0, resumed.output
    assert updates_of(path) == [0, 1, 2, 3]
    (path / "config.json").write_text(json.dumps({**config, "updates": 4}))
    done = run(2, "--resume", path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert updates_of(path) == [0, 1, 2, 3, 4]


def wrong_arguments(rank: int, size: int, file: str, out: str) -> None:
    with group_of(rank, size, file), pytest.MonkeyPatch.context() as patch:
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "here"}
        for name, value in said.items():  # as torchrun sets them; the group is there already
            patch.setenv(name, str(value))
        done = CliRunner().invoke(cli.app, ["train", "--prompts", "3", "--minibatches", "3", "--out", out])
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr == "prefixloss: --prompts: got 3, expected at least one a minibatch and process\n"


def test_wrong_arguments_end_all_processes_with_one_line(tmp_path: Path) -> None:
    in_processes(wrong_arguments, 2, tmp_path, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BRIEF = """
import torch
from prefixloss.rl.team import Team
team, model = Team.join("cpu", 60), torch.nn.Linear(300, 300)
for _ in range(60):
    model.zero_grad()
    model(torch.randn(4, 300)).sum().backward()
    team.sum_gradients(model.parameters())
    team.sum([1.0])  # of a tensor that only gloo still has
"""


@pytest.mark.slow
def test_no_process_is_aborted_at_its_end(tmp_path: Path) -> None:
    """Gloo's threads, left to themselves, abort every other of these runs while the interpreter shuts down."""
    (tmp_path / "brief.py").write_text(BRIEF)
    for _ in range(6):
        done = subprocess.run(
            [*launch(2), str(tmp_path / "brief.py")], env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def running(*arguments: Any) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run on two processes, once it has made an update, and their numbers by rank."""
    out = Path(arguments[arguments.index("--out") + 1])
    process = subprocess.Popen(
        command(2, *arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(updates_of(out)) < 2:
            assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        by_rank = {}
        for child in map(int, children):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
            by_rank |= dict.fromkeys(rank, child)
        yield process, [by_rank[0], by_rank[1]]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_lost_process_ends_the_run_in_bounded_time_and_the_checkpoint_goes_on(how: int, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with running(*flags(updates=100_000, timeout=30, out=path)) as (process, ranks):
        os.kill(ranks[1], how)
        assert process.wait(timeout=300) != 0
        assert process.stderr is not None
        assert "rank" in process.stderr.read().lower()
        for number in ranks:  # none is left behind
            with pytest.raises(ProcessLookupError):
                os.kill(number, 0)
    reached = updates_of(path)[-1]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "updates": reached + 2}))
    assert run(2, "--resume", path).returncode == 0
    assert updates_of(path) == list(range(reached + 3))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_scheduler_s_signal_is_passed_on_by_torchrun_and_saves(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with running(*flags(updates=100_000, save_every=100_000, out=path)) as (process, ranks):
        for number in (process.pid, *ranks):  # as to every process of a job
            os.kill(number, signal.SIGTERM)
        process.wait(timeout=600)
        assert process.stderr is not None
        assert f"--resume {path}" in process.stderr.read()
    saved = checkpoint.load(path / "checkpoint.pt")
    assert saved is not None
    assert saved["state"]["update"] == updates_of(path)[-1] > 0


@pytest.mark.slow
def test_a_locked_run_ends_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Lock() as lock:
        lock.take(path)
        done = run(2, *flags(updates=1, out=path))
    assert done.returncode != 0
    assert f"in use by process {os.getpid()} on" in done.stderr.replace("\n", "")
    assert list(path.iterdir()) == []
