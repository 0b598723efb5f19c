"""The loop: estimators, credit, one update, a whole run, and runs that are killed, stopped or fed NaN."""

import json
import os
import random
import shutil
import signal
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from processes import process_context
from rich.console import Console

from prefixloss import TokenAdvantages, cli
from prefixloss.io import checkpoint
from prefixloss.io.files import write_whole, write_whole_directory
from prefixloss.rl import UsageError, journal, task, train
from prefixloss.rl.config import Config
from prefixloss.rl.evaluate import evaluate, pass_at_k
from prefixloss.rl.metrics import Learned, metrics_of
from prefixloss.rl.optimise import NotFiniteError, Stepper, learning_rate
from prefixloss.rl.policy import tiny_policy
from prefixloss.rl.report import Report
from prefixloss.rl.rollouts import Checked
from prefixloss.rl.samples import write_samples
from prefixloss.rl.team import Team
from prefixloss.show import read_shown

# one-step problems: after a hundred warm steps a few answers are right, enough for every update to learn something
SMALL = {
    "updates": 20,
    "prompts": 4,
    "group": 8,
    "max_tokens": 20,
    "epochs": 1,
    "minibatches": 2,
    "eval_every": 10,
    "eval_problems": 4,
    "eval_samples": 2,
    "k": 2,
    "save_every": 4,
    "hidden_size": 32,
    "layers": 2,
    "warm_steps": 100,
    "warm_batch": 16,
    "warm_lr": 1e-2,
    "min_steps": 1,
    "max_steps": 1,
}


def quiet():
    return Report(Console(file=open(os.devnull, "w")))


def files(run):
    """What two runs must share to the bit."""
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "policy/model.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    train.train(Config(**SMALL), run, quiet())
    return run


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return tiny_policy(16, 1)


# ---- estimators


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (5, 2, 4), (6, 6, 2), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_evaluation_neither_uses_nor_moves_the_random_state_of_training(policy):
    config = Config(**SMALL)
    problems = task.chains(0, 0, 4, held_out=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(config, policy, problems)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert evaluate(config, policy, problems) == first
    assert set(first) == {"pass@1", "pass@2"}


# ---- credit

PROBLEM = task.Problem("(7+5)*3=?", "36", ("Step 1: 7+5=12", "Step 2: 12*3=36", "Answer: 36"))
RESPONSES = [
    "Step 1: 7+5=12\nStep 2: 12*3=36\nAnswer: 36",
    "Step 1: 7+5=12\nStep 2: 12*3=37\nAnswer: 37",  # wrong from token 8 on: a marker, 6 characters and a newline before
    "Step 1: 7+5=13\nStep 2: 13*3=39\nAnswer: 39",
    "Step 1: 7+5=12\nStep 2: 12*3=3",  # cut off
]


@pytest.fixture
def checked(policy):
    sampled = policy.written([PROBLEM.question] * 4, RESPONSES)
    sampled.finished[3] = False
    return train.judge(Config(), policy, [PROBLEM] * 4, sampled), sampled


def test_responses_are_checked_and_errors_are_placed_in_tokens(checked):
    result, _ = checked
    assert result.correct.tolist() == [True, False, False, False]
    assert result.first_error.tolist() == [-1, 8, 0, -1]
    assert result.right_steps.tolist()[1:] == [1, 0, 0]
    assert result.total_steps.tolist()[1:] == [3, 3, 3]


@pytest.mark.parametrize("detector", ["maths", "vote(maths,auto)"])
def test_a_detector_can_find_the_first_errors(policy, detector):
    sampled = policy.written([PROBLEM.question] * 4, RESPONSES)
    sampled.finished[3] = False
    result = train.judge(Config(detector=detector, steps="lines"), policy, [PROBLEM] * 4, sampled)
    assert result.correct.tolist() == [True, False, False, False]
    assert result.first_error.tolist() == [-1, 8, 0, -1]
    assert result.right_steps.tolist()[1:] == [1, 0, 0]
    assert "36 = 37 is false" in result.reasons[1]
    assert result.reasons[3] == ""


@pytest.mark.parametrize(("threshold", "first_error"), [(0.94, 8), (0.95, -1)])
def test_a_find_below_the_threshold_is_a_wrong_answer_without_a_known_first_error(policy, threshold, first_error):
    """The false equality is found with a confidence of 0.94."""
    sampled = policy.written([PROBLEM.question], RESPONSES[1:2])
    config = Config(detector="maths", steps="lines", threshold=threshold)
    result = train.judge(config, policy, [PROBLEM], sampled)
    assert result.first_error.tolist() == [first_error]
    credit = train.weigh(config, result, sampled, torch.zeros(1, dtype=torch.int64))
    assert credit.prefix_lengths.tolist() == [max(first_error, 0)]


@pytest.mark.parametrize("detector", [None, "maths"])
def test_right_answers_are_searched_only_when_their_wrong_steps_have_a_value(policy, detector):
    flawed = "Step 1: 7+5=12\nStep 2: 12*3=37\nAnswer: 36"
    sampled = policy.written([PROBLEM.question] * 2, [flawed, RESPONSES[0]])
    for worth, found, value in [(None, -1, 0.0), (0.25, 8, -0.75)]:
        config = Config(detector=detector, steps="lines", flawed=worth)
        result = train.judge(config, policy, [PROBLEM] * 2, sampled)
        assert result.correct.tolist() == [True, True]
        assert result.first_error.tolist() == [found, -1]
        credit = train.weigh(config, result, sampled, torch.zeros(2, dtype=torch.int64))
        assert credit.prefix_lengths.tolist() == [max(found, 0), 0]
        assert (credit.suffix[0] - credit.suffix[1]).item() == pytest.approx(value, abs=1e-6)  # float32
        of_wrong = metrics_of(config, sampled, result, Learned(tokens=1.0), Team())
        assert of_wrong["good_prefix"] == 0  # a figure of wrong answers alone
        assert of_wrong.get("flawed") == (None if worth is None else 0.5)


def test_the_policy_itself_can_find_the_first_errors(policy):
    """Its continuations are samples of its own; without a right one among them there is nothing to say."""
    sampled = policy.written([PROBLEM.question] * 2, RESPONSES[1:3])
    config = Config(detector="rollouts", continuations=2, steps="lines", max_tokens=4)
    result = train.judge(config, policy, [PROBLEM] * 2, sampled)
    assert result.first_error.tolist() == [-1, -1]
    assert result.reasons == ["no right answer in 2 continuations of the problem"] * 2
    with pytest.raises(UsageError, match="--continuations: got 0"):
        Config(detector="rollouts", continuations=0)


def test_samples_show_first_errors_reasons_and_each_token_s_advantage(policy, checked, tmp_path):
    result, sampled = checked
    credit = train.weigh(Config(), *checked, torch.zeros(4, dtype=torch.int64))
    path = tmp_path / "responses.jsonl"
    write_samples(path, policy, [PROBLEM] * 4, sampled, result, credit, "lines")
    shown = read_shown(path)
    assert ["".join(record.steps) for record in shown] == RESPONSES
    assert [record.first_error for record in shown] == [None, 1, 0, None]
    assert "expected 'Step 2: 12*3=36'" in shown[1].reason
    assert [record.confidence for record in shown] == [None, None, None, 0.0]
    for i, record in enumerate(shown):
        count = int(sampled.mask[i].sum())
        good = int(credit.prefix_lengths[i])
        assert record.advantages[:good] == pytest.approx([float(credit.prefix[i])] * good, abs=1e-6)
        assert record.advantages[good:] == pytest.approx([float(credit.suffix[i])] * (count - good), abs=1e-6)
        assert record.prefix_tokens == good


def test_a_correct_answer_that_was_cut_off_is_not_rewarded(policy):
    sampled = policy.written([PROBLEM.question], RESPONSES[:1])
    sampled.finished[0] = False
    assert train.judge(Config(), policy, [PROBLEM], sampled).correct.tolist() == [False]


def test_vppo_credit_of_a_group(checked):
    credit = train.weigh(Config(), *checked, torch.zeros(4, dtype=torch.int64))
    lengths = checked[1].mask.sum(1)
    mean = (1 + 0.5 * 8 / int(lengths[1])) / 4
    assert credit.prefix_lengths.tolist() == [0, 8, 0, 0]
    assert credit.suffix.tolist() == pytest.approx([1 - mean, -mean, -mean, -mean])
    assert float(credit.prefix[1]) == pytest.approx(0.5 - mean)


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "rts", "neutral", "cliff", "mixed"])
def test_the_other_advantages_raise_the_correct_and_lower_the_wrong(checked, name):
    credit = train.weigh(Config(advantage=name), *checked, torch.zeros(4, dtype=torch.int64))
    suffix = credit.suffix if isinstance(credit, TokenAdvantages) else credit
    assert float(suffix[0]) > 0 > float(suffix[1:].max())
    if name == "neutral":
        assert credit.prefix_lengths.tolist() == [0, 8, 0, 0]
        assert float(credit.prefix[1]) == 0
    if name == "rts":
        assert float(credit[1]) > float(credit[2])  # one right step of three against none
        assert float(credit[3]) == float(credit[2])  # cut off: nothing credited
    if name == "dr-grpo":
        assert credit.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    if name == "mixed":
        rewards = torch.tensor([1.0, 0.8 * float(checked[0].right_steps[1]) / 3, 0.0, 0.0])
        assert credit.tolist() == pytest.approx(((rewards - rewards.mean()) / rewards.std()).tolist(), rel=1e-4)


# ---- one update


def every_second_is_right(config, policy, problems, sampled):
    """An untrained policy is never right, and would have nothing to learn from."""
    count = torch.arange(len(problems))
    return Checked(count % 2 == 0, torch.full_like(count, -1), count * 0, count * 0 + 1)


def one_update(policy, **changes):
    config = Config(**{**SMALL, "minibatches": 1, **changes})
    reference = tiny_policy(16, 1)
    reference.model.load_state_dict(policy.model.state_dict())
    stepper = Stepper(config, policy.model, torch.optim.SGD(policy.model.parameters(), lr=config.lr))
    torch.manual_seed(1)
    metrics = train.learn(config, policy, reference, stepper, [PROBLEM] * config.prompts, every_second_is_right)
    return metrics, stepper.state, torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach().clone()


def test_the_first_step_on_fresh_samples_has_ratio_1_and_no_kl(policy):
    metrics, state, _ = one_update(policy, kl_coef=0.5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_share"] == 0
    assert metrics["learning_tokens"] == 1
    assert state.step == 1


def test_later_steps_on_the_same_samples_move_the_ratio_and_meet_the_clip(policy):
    metrics, state, _ = one_update(policy, epochs=4, lr=20.0, lr_warmup=0, kl_coef=0.01)
    assert metrics["kl"] > 0
    assert metrics["clip_share"] > 0
    assert state.step == 4


def test_micro_batches_add_up_to_the_same_step(policy):
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    parameters = []
    for micro_prompts in (4, 3, 1):
        policy.model.load_state_dict(start)
        parameters.append(one_update(policy, micro_prompts=micro_prompts, kl_coef=0.1, lr=1.0, lr_warmup=0)[2])
    before = torch.cat([p.flatten() for p in map(start.get, dict(policy.model.named_parameters()))])
    assert (parameters[0] - before).abs().max() > 1e-4
    torch.testing.assert_close(parameters[1], parameters[0])
    torch.testing.assert_close(parameters[2], parameters[0])


def test_learning_rate_rises_then_falls_to_a_tenth():
    config = Config(updates=10, epochs=1, minibatches=2, lr=1.0, lr_warmup=4)
    rates = [learning_rate(config, step) for step in range(1, 21)]
    assert rates[0] == pytest.approx(0.25 * 0.955)
    assert rates[3] == max(rates) == pytest.approx(0.82)
    assert rates[-1] == pytest.approx(0.1)


# ---- losses that are not finite


def poison(monkeypatch, calls):
    """Make the loss NaN in the given calls, counted from 0."""
    real, count = train.linear_prefix_loss, iter(range(10**9))

    def loss(*args, **kwargs):
        out = real(*args, **kwargs)
        if next(count) in calls:
            object.__setattr__(out, "loss", out.loss * float("nan"))
        return out

    monkeypatch.setattr(train, "linear_prefix_loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch, policy):
    before = torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach().clone()
    poison(monkeypatch, {0})
    metrics, state, after = one_update(policy)
    assert torch.equal(before, after)
    assert (metrics["skipped"], state.skipped, state.skipped_in_a_row, state.step) == (1, 1, 1, 0)
    assert np.isfinite(list(metrics.values())).all()


def test_three_in_a_row_stop_the_run_and_two_do_not(monkeypatch, tmp_path):
    poison(monkeypatch, {0, 1, 3, 4, 6, 7, 8})
    with pytest.raises(NotFiniteError, match=r"3 steps in a row, the last in update 5; .* smaller --lr"):
        train.train(Config(**SMALL), tmp_path, quiet())  # two steps an update: call 8 is in the fifth
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("skipped") for line in lines] == [None, 2, 3, 4, 6]


# ---- a whole run


def test_a_run_leaves_metrics_a_picture_a_checkpoint_and_a_policy(whole):
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [m["update"] for m in metrics] == list(range(21))
    assert [m["update"] for m in metrics if "pass@1" in m] == [0, 10, 20]
    assert all(0 <= m["pass@1"] <= m["pass@2"] <= 1 for m in metrics if "pass@1" in m)
    assert sum(m["reward"] for m in metrics[1:]) > 0
    assert metrics[-1]["kl"] > 1e-5  # it did learn: the other tests of whole runs compare something that moved
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
        "pages",
        "policy",
        "report.png",
        "responses.jsonl",
    ]


def test_the_final_table_and_the_progress_show_start_end_and_skipped_steps(tmp_path):
    with (tmp_path / "out").open("w") as file:
        report = Report(Console(file=file, width=100))
        with report.phase("training", 2):
            report.advance(reward=0.5, good_prefix=7.0, skipped=3)
        first = {"update": 0, "pass@1": 0.25, "pass@4": 0.5}
        last = {"update": 1, "pass@1": 0.375, "pass@4": 0.625, "kl": 0.5, "good_prefix": 7.0, "skipped": 3}
        report.evaluated(last)
        report.finish(tmp_path, [first, last], 4)
    text = (tmp_path / "out").read_text()
    for shown in ("skipped 3", "first error at token 7", "held-out pass@1 37.5%", "25.0%", "62.5%", "0.5000"):
        assert shown in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_final_table_is_not_cut_and_its_directory_is_no_markup(tmp_path, width):
    run = tmp_path / "[red]run\x1b[2J"
    run.mkdir()
    first = {"update": 0, "pass@1": 0.25, "pass@4": 0.5}
    shown = {"reward": 0.1, "good_prefix": 7.0, "good_steps": 1.5, "length": 9.0, "kl": 0.5, "clip_share": 0.25}
    with (tmp_path / "out").open("w") as file:
        report = Report(Console(file=file, width=width))
        report.finish(run, [first, {"update": 123_456, "pass@1": 0.375, "pass@4": 0.625, "skipped": 3, **shown}], 4)
    text = (tmp_path / "out").read_text()
    labels = ("good prefix of wrong responses, tokens", "right steps before the first error", "held-out pass@4")
    for label in (*labels, "start", "end", "25.00%", "minutes in this sitting", "123456 updates", "[red]run\u241b[2J"):
        assert label in text.replace("\n", "") or label in text
    assert not {"\u2026", "\x1b"} & set(text)


def test_another_seed_gives_another_run(whole, tmp_path):
    train.train(Config(**{**SMALL, "seed": 1, "updates": 1}), tmp_path, quiet())
    first_two = [(run / "metrics.jsonl").read_text().splitlines()[:2] for run in (tmp_path, whole)]
    assert first_two[0] != first_two[1]


@pytest.mark.slow
def test_training_solves_more_held_out_problems(tmp_path):
    history = train.train(Config(updates=60, eval_every=60), tmp_path, quiet())
    assert history[-1]["pass@1"] > history[0]["pass@1"] + 0.05


# ---- checkpoints


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda f: f.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    write_whole(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"


def test_write_whole_directory_replaces_what_an_earlier_try_left(tmp_path):
    (tmp_path / ".d.tmp").mkdir()
    (tmp_path / ".d.tmp" / "stale").write_text("")
    write_whole_directory(tmp_path / "d", lambda d: (d / "fresh").write_text("x"))
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "fresh"]


def test_a_checkpoint_restores_every_random_generator(tmp_path):
    draw = lambda: (random.random(), float(np.random.rand()), float(torch.rand(())))
    draw()
    checkpoint.save(tmp_path / "c.pt", {"x": torch.ones(2)})
    expected = draw()
    saved = checkpoint.load(tmp_path / "c.pt")
    checkpoint.restore_random(saved["random"])
    assert draw() == expected
    assert saved["x"].tolist() == [1, 1]
    assert checkpoint.load(tmp_path / "absent.pt") is None


# ---- interrupted runs


def held(run, update, line, stderr):
    """The command, which says when it has written the line of that update, and waits there to be told to go on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    append = journal.append_metrics

    def appended(path, metrics):
        append(path, metrics)
        if metrics["update"] == update:
            line.send("here")
            line.recv()

    journal.append_metrics = appended
    sys.argv = ["prefixloss", "train", "--resume", str(run)]
    cli.main()


def started(run, update):
    """The small run in a process of its own that waits at an update; the line to it, and where its stderr goes."""
    journal.open_run(run, Config(**SMALL).__dict__)
    context, stderr = process_context(), run.parent / "stderr"
    line, end = context.Pipe()
    process = context.Process(target=held, args=(run, update, end, stderr), daemon=True)
    process.start()
    end.close()
    assert line.recv() == "here"
    return process, line, stderr


def resume(run):
    config = json.loads((run / "config.json").read_text())
    return train.train(Config.of(config), run, quiet())


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    process, _, _ = started(tmp_path / "run", update=7)  # the last checkpoint at 4
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "policy").exists()
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["state"]["update"] == 4
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 99, "torn')
    (tmp_path / "run" / ".checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resume(tmp_path / "run")
    assert files(tmp_path / "run") == files(whole)


def test_ctrl_c_saves_says_how_to_resume_and_the_run_ends_with_the_same_bits(whole, tmp_path):
    process, line, stderr = started(tmp_path / "run", update=2)
    os.kill(process.pid, signal.SIGINT)
    line.send("go on")
    process.join()
    message = stderr.read_text()
    assert process.exitcode == 130, message
    assert f"prefixloss train --resume {tmp_path / 'run'}" in message
    assert "Traceback" not in message
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert saved["state"]["update"] == json.loads(lines[-1])["update"] < 20  # nothing done was lost
    resume(tmp_path / "run")
    assert files(tmp_path / "run") == files(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_ends_with_the_same_bits(whole, tmp_path):
    journal.open_run(tmp_path, Config(**SMALL).__dict__)
    resume(tmp_path)
    assert files(tmp_path) == files(whole)


def test_ctrl_c_in_the_warm_start_ends_it_with_a_run_that_can_start_over(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.Stop, "asked", True)
    with pytest.raises(KeyboardInterrupt):
        train.train(Config(**SMALL), tmp_path, quiet())
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    before = files(whole)
    assert resume(whole)[-1]["update"] == 20
    assert files(whole) == before


def test_a_second_ctrl_c_does_not_wait():
    stop = checkpoint.Stop()
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- a model of the user's


def test_a_saved_model_trains_on_problems_from_a_file(whole, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+1=?", "answer": i + 1}) + "\n" for i in range(20)))
    settings = {**SMALL, "updates": 2, "eval_every": 2, "shorten": "prompt", "micro_prompts": 1}
    config = Config(**settings, model=str(whole / "policy"), data=str(data))
    history = train.train(config, tmp_path / "run", quiet())
    assert [m["update"] for m in history] == [0, 1, 2]
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["state"]["step"] == 4
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(data)


# ---- a teacher


def with_teacher(policy, **changes):
    """One update beside a teacher of another width; the policy's parameters before and after it, and the metrics."""
    config = Config(**{**SMALL, "minibatches": 1, "teacher": "it", "advantage": "none", **changes})
    torch.manual_seed(3)
    teacher = tiny_policy(24, 1)
    start = torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach().clone()
    stepper = Stepper(config, policy.model, torch.optim.SGD(policy.model.parameters(), lr=config.lr))
    torch.manual_seed(1)
    metrics = train.learn(
        config, policy, tiny_policy(16, 1), stepper, [PROBLEM] * config.prompts, every_second_is_right, teacher=teacher
    )
    return start, torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach(), metrics


def test_a_teacher_alone_draws_the_policy_to_itself(policy):
    changes = {"distill_from": "all", "epochs": 8, "lr": 2.0, "lr_warmup": 0, "kl_coef": 0.0}
    start, end, first = with_teacher(policy, **{**changes, "epochs": 1})
    assert not torch.equal(start, end)
    _, _, later = with_teacher(policy, **changes)
    assert 0 < later["divergence"] < first["divergence"]


@pytest.mark.parametrize("distill_from", ["first-error", "wrong", "all"])
def test_the_teacher_is_asked_about_what_was_chosen(checked, distill_from):
    result, sampled = checked
    group_ids = torch.zeros(4, dtype=torch.int64)
    config = Config(teacher="it", distill_from=distill_from, distill_coef=0.5)
    weights = train.lessons(config, result, sampled, group_ids)
    mask = sampled.mask
    place = torch.arange(mask.shape[1])
    found = torch.tensor([[False], [True], [True], [False]])
    begins = torch.tensor([[0], [8], [0], [0]])
    chosen = {
        "first-error": mask & found & (place >= begins),
        "wrong": mask & torch.tensor([[False], [True], [True], [True]]),
        "all": mask,
    }[distill_from]
    torch.testing.assert_close(weights, 0.5 * chosen / mask.sum())


def test_its_loss_is_the_mean_over_groups_whatever_the_micro_batches(policy):
    ends = []
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    for micro in (4, 1):
        policy.model.load_state_dict(start)
        changes = {"distill_from": "wrong", "advantage": "vppo", "micro_prompts": micro, "lr": 1.0, "lr_warmup": 0}
        ends.append(with_teacher(policy, **changes)[1])
    torch.testing.assert_close(ends[0], ends[1])


def test_a_run_with_a_teacher_of_its_own_kind(whole, tmp_path):
    settings = {**SMALL, "updates": 1, "eval_every": 1, "warm_steps": 5, "seed": 3}
    config = Config(**settings, teacher=str(whole / "policy"), distill_from="all")
    history = train.train(config, tmp_path / "run", quiet())
    assert history[-1]["divergence"] > 0
    assert "divergence" not in json.loads((whole / "metrics.jsonl").read_text().splitlines()[1])


@pytest.mark.slow
def test_a_teacher_with_other_tokens_is_refused(whole, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(whole / "policy", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"Answer: "', '"Reply: "'))
    with pytest.raises(UsageError, match=r"--teacher: .* has another tokenizer than the policy"):
        train.train(Config(**SMALL, teacher=str(other)), tmp_path / "run", quiet())
    with pytest.raises(UsageError, match="--teacher: cannot load 'absent' as a causal"):
        train.train(Config(**SMALL, teacher="absent"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()
