"""The method's claims: the tree follows the theorem, runs and noise do what they say, tables follow from JSON."""

import json
import statistics
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.method import commands as method
from bench.method import judge as method_judge
from bench.method import runs as method_runs
from bench.method import show as method_show
from bench.method import tree as method_tree
from prefixloss import LossConfig, advantages, linear_prefix_loss
from prefixloss.detect.records import read_records
from prefixloss.rl import task, train
from prefixloss.rl.config import Config
from prefixloss.rl.optimise import Stepper
from prefixloss.rl.policy import tiny_policy
from prefixloss.rl.start import frozen

# ---- the tree


def test_rewards_are_the_raw_values_of_vppo():
    depth = 5
    right = np.array([0, 2, 4, 5])
    got = method_tree.rewards(right, depth, first_error=True)
    # a group beside many correct responses has their values minus one mean
    correct = torch.tensor([False, False, False, True])
    error = torch.tensor([0, 2, 4, -1])
    spread = advantages.vppo(
        correct, torch.full((4,), depth), error, torch.zeros(4, dtype=torch.int64), alpha=method_tree.ALPHA, shorten=0
    )
    mask = torch.ones(4, depth, dtype=torch.bool)
    shifted = spread.per_token(mask, mask).numpy()
    mean = (1 + method_tree.ALPHA * (0 + 2 + 4) / depth) / 4
    np.testing.assert_allclose(got - mean, shifted, atol=1e-6)
    assert method_tree.rewards(right, depth, first_error=False).tolist() == [[0.0] * 5] * 3 + [[1.0] * 5]


@pytest.mark.parametrize("first_error", [False, True])
def test_a_step_follows_the_exact_gradient_of_the_expected_value(first_error):
    """Over all paths of a small tree: sum of probability * values * slopes = gradient of the expected value per token
    behind a choice, since a token's value weighs its own choice alone."""
    depth, theta = 3, torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)
    p = torch.sigmoid(theta).numpy()
    expected = np.zeros(depth)
    for right in range(depth + 1):
        chance = np.prod(p[:right]) * (1 - p[right] if right < depth else 1.0)
        layer = np.arange(depth)
        slope = np.where(layer < right, 1 - p, np.where(layer == right, -p, 0.0))
        expected += chance * method_tree.rewards(np.array([right]), depth, first_error)[0] * slope
    if first_error:
        reach = np.cumprod(np.concatenate([[1.0], p[:-1]]))  # of a layer's node
        solved = np.prod(p)
        # value of a right choice at a layer: alpha, and 1 - alpha more if the rest of the path is right too
        want = reach * p * (1 - p) * method_tree.ALPHA + (1 - method_tree.ALPHA) * solved * (1 - p)
    else:
        want = np.prod(p) * (1 - p)
    np.testing.assert_allclose(expected, want, rtol=1e-12)


def test_first_errors_need_far_fewer_samples_in_a_deep_tree():
    for suffix in ("", ", groups"):
        outcome, error = (
            statistics.fmean(method_tree.samples_needed(10, kind + suffix, 8, seed=1))
            for kind in ("outcome", "first error")
        )
        assert outcome > 3 * error
    assert method_tree.samples_needed(6, "outcome", 4, seed=2) == method_tree.samples_needed(6, "outcome", 4, seed=2)


def test_growth_tells_doublings_from_powers():
    doubling = {str(h): [2**h, 2**h] for h in range(2, 12)}
    linear = {str(h): [100 * h] for h in range(2, 12)}
    assert method_tree.growth(doubling)["doublings_a_layer"] == pytest.approx(1)
    assert method_tree.growth(linear)["power_of_depth"] == pytest.approx(1)


# ---- judges

PROBLEM = task.Problem("7+5-2*3=?", "30", ("Step 1: 7+5=12", "Step 2: 12-2=10", "Step 3: 10*3=30", "Answer: 30"))
WRONG = "\n".join(["Step 1: 7+5=12", "Step 2: 12-2=10", "Step 3: 10*3=31", "Step 4: 31+1=32", "Answer: 32"])


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return tiny_policy(16, 1)


def judged(policy, judge, texts, seed=0):
    sampled = policy.written([PROBLEM.question] * len(texts), texts)
    return judge(seed)(Config(), policy, [PROBLEM] * len(texts), sampled), sampled


def test_noise_moves_errors_the_way_and_as_often_as_it_says(policy):
    texts = [WRONG] * 400
    exact, sampled = judged(policy, method_runs.exact, texts)
    starts = method_runs.line_starts(policy, sampled.tokens[0][sampled.mask[0]])
    true = int(exact.first_error[0])
    assert true == starts[2]
    allowed = {"early": set(starts[:2]), "late": set(starts[3:]), "missed": {-1}}
    for kind, places in allowed.items():
        noisy, _ = judged(policy, method_runs.Noisy(kind, 0.25), texts)
        moved = [e for e in noisy.first_error.tolist() if e != true]
        assert set(moved) == places
        assert 60 <= len(moved) <= 140  # 100 expected, standard deviation 8.7
        again, _ = judged(policy, method_runs.Noisy(kind, 0.25), texts)
        assert torch.equal(noisy.first_error, again.first_error)
        assert torch.equal(noisy.correct, exact.correct)


def test_noise_leaves_an_error_that_cannot_move(policy):
    texts = ["Step 1: 7+5=13\nAnswer: 13"] * 20
    noisy, _ = judged(policy, method_runs.Noisy("early", 1.0), texts)
    assert noisy.first_error.tolist() == [0] * 20


def test_the_loose_judge_takes_every_true_step(policy):
    useless = "\n".join(["Step 1: 1+1=2", "Step 2: 2+2=4", "Step 3: 9*9=80", "Answer: 4"])
    skips = "\n".join(["Step 1: 1+1=2", "Step 3: 2+2=4", "Answer: 4"])
    all_true = "\n".join(["Step 1: 1+1=2", "Answer: 2"])
    texts = [useless, skips, all_true, PROBLEM.solution]
    checked, sampled = judged(policy, method_runs.loose, texts)
    starts = [
        method_runs.line_starts(policy, row[keep]) for row, keep in zip(sampled.tokens, sampled.mask, strict=True)
    ]
    assert checked.first_error.tolist() == [starts[0][2], starts[1][1], starts[2][1], -1]
    assert [method_runs.true_steps(text) for text in texts] == [2, 1, 1, 3]


# ---- runs and tables


def test_equal_runs_of_two_comparisons_are_one():
    keys = {name: {c.name: c.key for c in conditions} for name, conditions in method_runs.EXPERIMENTS.items()}
    assert keys["compare"]["VPPO"] == keys["alpha"]["0.5"] == keys["noise"]["none"]
    assert keys["compare"]["GRPO"] == keys["noise"]["GRPO"]
    of_each = [key for by_name in keys.values() for key in set(by_name.values())]
    assert keys["teacher"]["VPPO"] == keys["compare"]["VPPO"]
    assert keys["teacher"]["GRPO"] == keys["compare"]["GRPO"]
    assert keys["tolerance"]["VPPO"] == keys["compare"]["VPPO"]
    for c in (c for conditions in method_runs.EXPERIMENTS.values() for c in conditions):
        beside = {"teacher": "a model"} if c.taught else {}
        assert replace(method_runs.SMALL, **c.options, **beside).updates == 40  # settings that can work
    assert keys["judge"]["exact check"] == keys["compare"]["VPPO"]
    assert keys["judge"]["GRPO"] == keys["compare"]["GRPO"]
    assert len(set(of_each)) == len(of_each) - 8


SHORT = replace(
    method_runs.SMALL, updates=2, prompts=2, group=2, minibatches=1, eval_every=1, eval_problems=2, eval_samples=4,
    max_tokens=8, hidden_size=16, layers=1, warm_steps=2,
)  # fmt: skip


def test_a_run_starts_from_its_seed_s_policy_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(method_runs, "SMALL", SHORT)
    start = method_runs.warm(0, tmp_path)
    made = start.stat().st_mtime_ns
    assert method_runs.warm(0, tmp_path).stat().st_mtime_ns == made
    condition = method_runs.Condition("Mixed", {"advantage": "mixed"})
    runs = [method_runs.run(condition, 0, start, SHORT) for _ in range(2)]
    assert runs[0]["curve"] == runs[1]["curve"]
    assert [point["update"] for point in runs[0]["curve"]] == [0, 1, 2]
    assert runs[0]["key"] == condition.key


def left_out():
    """By a loss of the tiny model's size, with half as much asked."""
    torch.manual_seed(0)
    hidden, head = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    config = LossConfig(gradient_tolerance=0.5, head_gradient_tolerance=0.5)
    given = hidden, head, torch.arange(8), torch.ones(1)
    return float(
        linear_prefix_loss(*given, cu_seqlens=torch.tensor([0, 8]), config=config).metrics["gradient_left_out"]
    )


def test_runs_with_a_tolerance_leave_out_what_they_may(tmp_path, monkeypatch):
    """The product with all of the gradient is faster for the tiny model's few tokens, and would leave out nothing."""
    monkeypatch.setattr(method_runs, "SMALL", SHORT)
    start = method_runs.warm(0, tmp_path)

    def learn(config, policy, reference, stepper, problems, judge, teacher):
        judge(config, policy, *train.sample(config, policy, problems))
        return {"reward": 0.0, "length": 0.0, "kl": 0.0, "gradient_left_out": left_out()}

    monkeypatch.setattr(train, "learn", learn)
    exact, *tolerant = method_runs.EXPERIMENTS["tolerance"]
    assert "gradient_left_out" not in method_runs.run(exact, 0, start, SHORT)["curve"][-1]
    for condition in tolerant:
        assert 0.1 < method_runs.run(condition, 0, start, SHORT)["curve"][-1]["gradient_left_out"] <= 0.5
    assert left_out() == 0


def test_what_was_left_out_is_a_column(tmp_path):
    runs = [
        record(condition, seed, **({"gradient_left_out": 2e-4} if condition.tolerant else {}))
        for condition in method_runs.EXPERIMENTS["tolerance"]
        for seed in range(10)
    ]
    lines = method_show.table("tolerance", runs).splitlines()
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in lines) if len(cells) > 2}
    assert rows[""][4] == " gradient_left_out "
    assert rows["VPPO"][4].strip() == ""
    assert rows["auto, both"][4:6] == [" 2.0e-04 ", " +0.0 ± 0.0 % "]


def test_taught_runs_have_one_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(method_runs, "SMALL", SHORT)
    monkeypatch.setattr(method_runs, "STRONGER", replace(SHORT, seed=7))
    start = method_runs.warm(0, tmp_path)
    curves = {}
    for condition in method_runs.EXPERIMENTS["teacher"][3:]:
        assert condition.taught
        curves[condition.name] = method_runs.run(condition, 0, start, replace(SHORT, lr_warmup=0))["curve"]
        assert (tmp_path / "teacher" / "config.json").exists()
    # a policy that is never right has responses to learn from where all are its teacher's matter
    assert [point["update"] for point in curves["teacher alone, all responses"]] == [0, 1, 2]
    assert curves["teacher alone, all responses"][-1]["kl"] > 0


@pytest.fixture
def judge_at_hand(tmp_path, monkeypatch):
    """A judge made in a second: written solutions, half of them with a wrong line, labelled by the rules."""

    def written(policy, config, count, *, held_out):
        problems = task.chains(config.seed, 0, 8, min_steps=2, max_steps=3, held_out=held_out)
        wrong = [p.solution.replace("=", "=1", 1).replace("Answer: ", "Answer: 1") for p in problems]
        return [*((p, p.solution) for p in problems), *zip(problems, wrong, strict=True)]

    monkeypatch.setattr(method_runs, "SMALL", SHORT)
    monkeypatch.setattr(method_runs, "WRITER", replace(SHORT, seed=5))
    monkeypatch.setattr(method_runs, "STRONGER", replace(SHORT, seed=7))
    monkeypatch.setattr(method_judge, "written", written)
    monkeypatch.setattr(method_judge, "ROLLOUTS", "maths")
    monkeypatch.setattr(method_judge, "SETTINGS", replace(method_judge.SETTINGS, epochs=1, held_out=0.3))
    return tmp_path


def test_a_judged_run_asks_the_trained_judge(judge_at_hand, monkeypatch):
    condition = next(c for c in method_runs.EXPERIMENTS["judge"] if c.judged)
    asked = []
    by_name = train.by_name
    monkeypatch.setattr(train, "by_name", lambda name, **options: (asked.append(name), by_name(name, **options))[1])
    start = method_runs.warm(0, judge_at_hand)
    method_runs.run(condition, 0, start, replace(SHORT, updates=1))
    assert asked == [f"prm:{judge_at_hand / 'judge'}"]
    labels = read_records(judge_at_hand / "judge-labels.jsonl", "labelled")
    assert sorted(record.label for record in labels) == [-1] * 8 + [0] * 8
    made = (judge_at_hand / "judge" / "report.json").stat().st_mtime_ns
    assert method_runs.trained_judge(judge_at_hand).joinpath("report.json").stat().st_mtime_ns == made


def test_judges_are_measured_and_shown(judge_at_hand):
    arguments = ["judge", "--work", str(judge_at_hand), "--out", str(judge_at_hand / "new")]
    result = CliRunner().invoke(method.app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((judge_at_hand / "new" / "judge.json").read_text())
    assert (record["responses"], record["wrong"]) == (16, 8)
    assert len(record["judges"]) == 6
    text = method_judge.table(record)
    assert "| the model's rollouts, 8 samples | 100.0 % | 0.0 % | 0.0 % | 0.0 % | 0.0 % |" in text
    places, sure = method_show.draw_judges(record).axes
    assert len(places.patches) == 4 * 6
    assert sum(bar.get_width() for bar in places.patches) == pytest.approx(600)  # each judge's shares are all there is
    assert len(sure.lines) == 1 + 6


def test_what_is_written_is_whole_and_labelled_by_the_exact_check(policy):
    assert method_judge.written(policy, replace(SHORT, max_tokens=1), 4, held_out=False) == []
    lines = "Step 1: 7+5=12\nStep 2: 12-2=11"
    records = method_judge.records_of([(PROBLEM, PROBLEM.solution), (PROBLEM, WRONG), (PROBLEM, lines)])
    assert [record.label for record in records] == [-1, 2, 1]
    short = method_judge.records_of([(PROBLEM, "Step 1: 7+5=12")])
    assert short[0].label == 0  # the line that is missing stands for the last that is there


def test_only_missing_runs_are_made_and_pictures_follow_from_the_files(tmp_path, monkeypatch):
    made = []

    def fake(condition, seed, start):
        made.append((condition.key, seed))
        return record(condition, seed)

    class Here:  # runs in this process
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(lambda f, *rows: list(map(f, *rows)))

        def submit(self, f, *arguments):
            future: Future = Future()
            future.set_result(f(*arguments))
            return future

    monkeypatch.setattr(method, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(method_runs, "run", fake)
    monkeypatch.setattr(method_runs, "warm", lambda seed, directory: directory / f"{seed}")
    monkeypatch.setattr(method_runs, "SEEDS", {**method_runs.SEEDS, "compare": 5, "alpha": 3})
    first = method_runs.EXPERIMENTS["compare"][0]
    method.write_runs(tmp_path / "runs.jsonl", [record(first, 0)])
    where = ["--out", str(tmp_path)]
    command = CliRunner().invoke(method.app, ["train", "compare", "alpha", *where, "--work", str(tmp_path / "work")])
    assert command.exit_code == 0, command.output
    assert (first.key, 0) not in made
    assert len(made) == len(set(made)) == 5 * 5 + 3 * 3 - 1
    measure = method_tree.measure
    monkeypatch.setattr(method_tree, "measure", lambda runs: measure(runs, (2, 3, 4)))
    assert CliRunner().invoke(method.app, ["tree", "--runs", "2", *where]).exit_code == 0
    shown = CliRunner().invoke(method.app, ["show", *where])
    assert shown.exit_code == 0, shown.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"tree.png", "compare.png", "alpha.png"}
    # VPPO ends at 50, 51, .. 54 %, GRPO 10 below: written with the interval over five seeds
    half = 2.776 * statistics.stdev([0, 1, 2, 3, 4]) / 5**0.5
    text = (tmp_path / "results.md").read_text()
    assert f"| VPPO | 52.0 ± {half:.1f} % |" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["GRPO"].endswith(" |  | +10.0 ± 0.0 % |")
    assert rows["RTS"].endswith(" | +10.0 ± 0.0 % | +0.0 ± 0.0 % |")
    assert json.loads((tmp_path / "tree.json").read_text())["runs"] == 2


def record(condition, seed, **more):
    end = 0.5 + 0.01 * seed - 0.1 * (condition.name == "GRPO")
    curve = [
        {"update": u, "pass@1": share, "pass@4": share, "steps": 5.0, "length": 40.0, "reward": 0.1, "kl": 0.0, **more}
        for u, share in ((0, 0.1), (10, end))
    ]
    return {"key": condition.key, "seed": seed, "seconds": 1, "curve": curve}


def test_an_interval_is_student_s():
    assert method_show.interval([1.0]) == (1.0, 0.0)
    mean, half = method_show.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))


def test_an_unknown_comparison_is_named(tmp_path):
    result = CliRunner().invoke(method.app, ["train", "alphas", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "alphas" in result.output


def test_the_judge_is_what_an_update_asks(policy):
    """`judge` of `train.learn` replaces the built-in one."""
    asked = []

    def judge(config, policy, problems, sampled):
        asked.append(len(problems))
        return train.judge(config, policy, problems, sampled)

    config = replace(SHORT, kl_coef=0.0)
    model = tiny_policy(16, 1)
    stepper = Stepper(config, model.model, torch.optim.SGD(model.model.parameters(), lr=0.1))
    train.learn(config, model, frozen(model), stepper, [PROBLEM] * 2, judge)
    assert asked == [4]
