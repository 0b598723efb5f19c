"""A process reward model trained end to end: a tiny one, on labels that are known and on labels from the rules."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_detect_logits import VOCABULARY, tokenizer
from transformers import AutoModelForTokenClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.detect import train_prm
from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.choose import by_name
from prefixloss.detect.evaluate import Scores
from prefixloss.detect.models.batches import first_below
from prefixloss.detect.models.prm import PRM
from prefixloss.detect.models.search import Counted
from prefixloss.detect.prm_examples import Settings, example_of, load_base, split
from prefixloss.detect.prm_learner import THRESHOLDS, balance, cross_entropy
from prefixloss.detect.records import FormatError, Record, read_records

SEPARATOR = "<extra_0>"


def records(count: int, seed: int = 0) -> list[Record]:
    """Steps that say "ok" and, in two of three responses, one that says "no", and more behind it."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        steps = [rng.choice(["ok a", "ok b"]) for _ in range(rng.randint(1, 4))]
        label = rng.randrange(len(steps)) if number % 3 else -1
        if label >= 0:
            steps[label] = "no" + steps[label][2:]
            steps[label + 1 :] = [rng.choice(["ok c", "no c"]) for _ in steps[label + 1 :]]
        made.append(Record(f"{number // 2}?", steps, None, label, {}))
    return made


def base_in(folder: Path, **settings: object) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2,
        **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return base_in(tmp_path_factory.mktemp("base"))


QUICK = Settings(epochs=5, batch_size=8, lr=1e-2, held_out=0.2, device="cpu")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("prm") / "prm"
    losses: list[float] = []
    counts: list[tuple[int, int]] = []
    result = train_prm.train_prm(
        records(128), base, out, QUICK, begun=lambda steps, done: counts.append((steps, done)), advance=losses.append
    )
    assert counts == [(len(losses), 0)]
    return result, out, losses


def test_a_judge_learns_and_finds_what_it_was_shown_in_new_responses(trained) -> None:
    result, out, losses = trained
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    best = result.by_threshold[result.threshold]
    assert best.f1 > 0.9
    new = records(60, seed=9)
    found = by_name(f"prm:{out}").detect_batch([r.problem for r in new], [r.steps for r in new])
    labels = [None if r.label == -1 else r.label for r in new]
    assert sum(f.step == label for f, label in zip(found, labels, strict=True)) >= 55
    assert set(labels) >= {None, 0, 1, 2}


def test_the_checkpoint_is_one_of_transformers_and_knows_its_threshold(trained) -> None:
    result, out, _ = trained
    model, tokens = AutoModelForTokenClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokens(f"1?\nok a{SEPARATOR}no b{SEPARATOR}")["input_ids"]
    ends = [k for k, token in enumerate(ids) if token == tokens.convert_tokens_to_ids(SEPARATOR)]
    right = model(torch.tensor([ids])).logits[0, ends].softmax(-1)[:, 1].tolist()
    found = PRM(str(out)).detect("1?", ["ok a", "no b"])
    assert found.step == 1
    assert found.confidence == pytest.approx(1 - right[1], abs=1e-4)
    assert f"is below {result.threshold:g}" in found.reason
    report = json.loads((out / "report.json").read_text())
    assert report["threshold"] == result.threshold == model.config.prefixloss_threshold
    assert report["f1_by_threshold"][f"{result.threshold:g}"] == max(report["f1_by_threshold"].values())
    assert report["training_responses"] + report["held_out_responses"] == 128
    assert len(report["held_out_loss"]) == QUICK.epochs
    assert report["held_out_loss"][report["epoch"] - 1] == min(report["held_out_loss"])


def test_the_same_seed_gives_the_same_judge(base, tmp_path) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        losses: list[float] = []
        train_prm.train_prm(
            records(24), base, tmp_path / name, replace(QUICK, epochs=1, seed=seed), advance=losses.append
        )
        runs.append(losses)
    assert runs[0] == runs[1] != runs[2]


def test_steps_behind_the_first_wrong_one_have_no_label(base) -> None:
    model, tokens = load_base(base, QUICK)
    steps = ["a", "b", "c", "d"]
    labels = [example_of(Record("p", steps, None, label, {}), model, tokens, QUICK).labels for label in (-1, 0, 2)]
    assert labels == [[1, 1, 1, 1], [0, None, None, None], [1, 1, 0, None]]
    examples = [example_of(Record("p", steps, None, label, {}), model, tokens, QUICK) for label in (-1, 2)]
    # six right steps and one wrong one: 7 / 12 and 7 / 2
    assert balance(examples).tolist() == pytest.approx([7 / 2, 7 / 12])
    assert example_of(Record("p", ["x" * 100], None, -1, {}), model, tokens, QUICK) is None
    with pytest.raises(ValueError, match="got 0 wrong and 4 right steps"):
        balance(examples[:1])
    soft = example_of(Record("p", steps, None, 2, {}, [0.75, 0.75, 0.5, None]), model, tokens, QUICK)
    assert soft.labels == [0.75, 0.75, 0.5, None]
    # one wrong step and two right ones, in halves and quarters: 3 / 2 and 3 / 4
    assert balance([soft]).tolist() == [3 / 2, 3 / 4]


def test_the_loss_of_soft_labels_is_the_formula_s() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.5, -0.5], [2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    p = [1 / (1 + math.exp(-gap)) for gap in (2.0, -1.0, -1.0)]
    y, w0, w1 = [1.0, 0.25, 0.0], 3.0, 0.5
    weight = [(w1 * right, w0 * (1 - right)) for right in y]
    loss = -sum(a * math.log(q) + b * math.log(1 - q) for (a, b), q in zip(weight, p, strict=True))
    weights = torch.tensor([w0, w1], dtype=torch.float64)
    got = cross_entropy(logits, torch.tensor(y, dtype=torch.float64), weights)
    assert got.item() == pytest.approx(loss / sum(map(sum, weight)), rel=1e-12)
    hard = torch.tensor([1, 0, 0])
    expected = torch.nn.functional.cross_entropy(logits, hard, weights)
    torch.testing.assert_close(cross_entropy(logits, hard.double(), weights), expected)


def test_the_chances_of_soft_labels_are_learned(base, tmp_path) -> None:
    """At a chance y the weighted loss is least at w1 y / (w1 y + w0 (1 - y)), the weights one over their classes."""
    chance = {"ok": 0.9, "no": 0.3}
    soft = [r._replace(chances=[chance[step[:2]] for step in r.steps]) for r in records(96)]
    out = tmp_path / "prm"
    train_prm.train_prm(soft, base, out, replace(QUICK, epochs=6))
    every = [c for r in soft for c in r.chances]
    right = sum(every)
    wrong = len(every) - right
    expected = {w: y / right / (y / right + (1 - y) / wrong) for w, y in chance.items()}
    got = {w: 1 - PRM(str(out), threshold=1.0).detect("0?", [f"{w} a"]).confidence for w in chance}
    assert got == pytest.approx(expected, abs=0.1)
    assert expected["ok"] - expected["no"] > 0.4


def test_the_best_threshold_needs_no_f1_and_is_the_one_in_the_middle() -> None:
    """Two responses with rewards 0.4 and 0.7 at their wrong first steps: all thresholds from 0.75 on find both, none
    below 0.45 finds any. With a right response of 0.72 besides, only those up to 0.7 leave it alone."""

    def by_threshold(labels, rewards):
        return {t: Scores(labels, [first_below([r], t) for r in rewards], 1, 0.0) for t in THRESHOLDS}

    assert train_prm.best_threshold(by_threshold([0, 0], [0.4, 0.7])) == 0.75
    assert by_threshold([0, 0], [0.4, 0.7])[0.75].f1 is None
    assert train_prm.best_threshold(by_threshold([0, 0, -1], [0.4, 0.7, 0.72])) == 0.5


def test_no_problem_is_in_both_parts() -> None:
    made = records(100)
    training, held_out = split(made, 0.2)
    assert len(training) + len(held_out) == 100
    assert not {r.problem for r in training} & {r.problem for r in held_out}
    assert len({r.problem for r in held_out}) == 10
    with pytest.raises(ValueError, match="got 1 different problems"):
        split(made[:1], 0.2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"lr": 0.0}, "lr: got 0"),
        ({"held_out": 1.0}, "held_out: got 1"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"separator": ""}, "separator: got ''"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, says) -> None:
    with pytest.raises(ValueError, match=says):
        Settings(**options)


# ---- commands


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["prm", *map(str, arguments)])


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_responses_are_labelled_by_the_rules_and_a_judge_is_trained_on_the_labels(base, tmp_path) -> None:
    rng = random.Random(3)
    rows = []
    for number in range(40):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        said = a + b + (number % 2)
        steps = [f"{a}+{b}={said}", f"The answer is {said}"]
        rows.append({"problem": f"{a}+{b}=?", "steps": steps, "answer": str(a + b)})
    rows.append({"problem": "Who?", "steps": ["Ann."]})
    data, labels, out = written(tmp_path / "in.jsonl", rows), tmp_path / "labels.jsonl", tmp_path / "prm"
    result = invoke("label", data, "--detector", "maths", "--out", labels)
    assert result.exit_code == 0, result.output
    assert "40 of 41 responses labelled: an error in 20, none in 20" in result.output
    made = [json.loads(line) for line in labels.read_text().splitlines()]
    assert [row["first_error"] for row in made] == [None, 0] * 20
    result = invoke("train", labels, "--model", base, "--out", out, "--epochs", 1, "--lr", 0.01, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "on held-out problems" in " ".join(result.output.split())
    assert PRM(str(out)).detect("1+1=?", ["1+1=2"]).confidence > 0
    again = invoke("train", labels, "--model", base, "--out", out)
    assert (again.exit_code, "exists already" in again.output.replace("\n", "")) == (2, True)


def test_rollout_labels_are_soft_and_are_read_again(base, tmp_path, monkeypatch) -> None:
    """A judge that counts: a line of its verdict has the chances, and `prm train` takes them in the labels' place."""

    class Counting(Saying):
        def find(self, problem: str, steps, answer) -> FirstError:
            return Counted.of(1, "counted", 0.9, [0.97, 1 / 16, None])

    monkeypatch.setattr("prefixloss.detect.commands.by_name", lambda name: Counting())
    rows = [{"problem": f"{k}?", "steps": ["ok a", "no a", "ok b"], "answer": "7"} for k in range(4)]
    out = tmp_path / "labels.jsonl"
    result = invoke("label", written(tmp_path / "in.jsonl", rows), "--detector", "x", "--out", out)
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["chances"] for line in out.read_text().splitlines()] == [[0.97, 0.0625, None]] * 4
    assert [record.chances for record in read_records(out, "labelled")] == [[0.97, 0.0625, None]] * 4


@pytest.mark.parametrize("chances", [[0.5], [0.5, 1.5], [0.5, "1"], [True, 0.5], 0.5])
def test_soft_labels_that_are_none_are_refused(tmp_path, chances) -> None:
    rows = [{"problem": "?", "steps": ["a", "b"], "first_error": None, "chances": chances}]
    with pytest.raises(FormatError, match="the key 'chances' has to be a list of 2 numbers from 0 to 1"):
        read_records(written(tmp_path / "in.jsonl", rows), "labelled")


class Saying(Detector):
    """What the problem says: a step and a confidence."""

    def find(self, problem: str, steps, answer) -> FirstError:
        step, confidence = problem.split()
        return FirstError(None if step == "none" else int(step), "", float(confidence))


def test_only_what_is_known_well_enough_becomes_a_label(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("prefixloss.detect.commands.by_name", lambda name: Saying())
    cases = (("0 0.9", "3"), ("0 0.4", "3"), ("none 0.9", "3"), ("none 0.0", "3"), ("none 0.0", "2"))
    rows = [{"problem": says, "steps": ["The answer is 2"], "answer": answer} for says, answer in cases]
    out = tmp_path / "out.jsonl"
    result = invoke("label", written(tmp_path / "in.jsonl", rows), "--detector", "x", "--threshold", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    labels = [(row["problem"], row["first_error"]) for row in kept]
    assert labels == [("0 0.9", 0), ("none 0.9", None), ("none 0.0", None)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "plain"], "--format: got 'plain'"),
        (["--epochs", "0"], "epochs: got 0"),
        (["--max-tokens", "1"], "max_tokens: no response of training fits"),
        (["--model", "EMPTY"], "model: cannot load"),
    ],
)
def test_wrong_arguments_get_one_line(base, tmp_path, arguments, says) -> None:
    rows = [{"problem": f"{k}", "steps": ["a", "b"], "first_error": 1} for k in range(4)]
    data = written(tmp_path / "in.jsonl", rows)
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / a) if a == "EMPTY" else a for a in arguments]
    result = invoke("train", data, "--model", base, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output.replace("\n", "")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
