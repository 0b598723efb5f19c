"""A language model's next token as a verdict: a tiny model whose probabilities are computed by hand, and what must not
matter."""

import itertools
import math
import pickle
import random
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixloss.detect.base import FirstError
from prefixloss.detect.choose import by_name
from prefixloss.detect.cost import spent
from prefixloss.detect.models.logits import Logits, _load, best

LETTERS = sorted(set("\n +-:.,;=?()") | set("0123456789") | {chr(c) for c in (*range(65, 91), *range(97, 123))})
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}


def tokenizer(without: str = "") -> PreTrainedTokenizerFast:
    """A token a character."""
    kept = [token for token in VOCABULARY if token not in tuple(without)]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(kept)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    torch.manual_seed(8)  # of these models one with verdicts of every kind
    folder = tmp_path_factory.mktemp("causal")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1500, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


PROBLEM, STEPS = "What is 1 + 2 ?", ["Add them.", "1 + 2 = 4.", "So it is 4."]


def probability_of_plus(name: str, text: str) -> float:
    """Of the next token, over + and - alone, by asking the model once."""
    model, tokens = LlamaForCausalLM.from_pretrained(name), tokenizer()
    logits = model(torch.tensor([tokens(text)["input_ids"]])).logits[0, -1].detach().double()
    plus, minus = (math.exp(logits[VOCABULARY[sign]]) for sign in "+-")
    return plus / (plus + minus)


def test_each_step_is_asked_behind_right_ones_and_the_score_is_the_papers(name: str) -> None:
    """Every outcome by itself: its marks are written out, and each mark's probability asked for."""
    text = _load(name, "auto", "auto", False).tokenizer.decode(
        _load(name, "auto", "auto", False).read(PROBLEM, STEPS, None).ids
    )
    assert text.endswith("So it is 4.\nMark:+")
    assert "What is 1 + 2 ?" in text
    parts = text.split("Mark:+")[:-1]
    scores = []
    for wrong in range(len(STEPS) + 1):
        score = 0.0
        for t in range(min(wrong + 1, len(STEPS))):
            plus = probability_of_plus(name, "Mark:+".join(parts[: t + 1]) + "Mark:")
            score += math.log(1 - plus if t == wrong else plus)
        scores.append(score)
    assert sum(map(math.exp, scores)) == pytest.approx(1)
    top = scores.index(max(scores))
    found = Logits(name).detect(PROBLEM, STEPS)
    assert found.step == (None if top == len(STEPS) else top)
    assert found.confidence == pytest.approx(math.exp(max(scores)), rel=1e-4)


@pytest.mark.parametrize(
    ("right", "step", "confidence"),
    [
        ([0.9, 0.2, 0.9], 1, 0.72),
        ([0.9, 0.9, 0.9], None, 0.729),
        ([0.5], 0, 0.5),  # as probable as none: the earlier
        ([0.0, 1.0], 0, 1.0),
        ([1.0, 1.0], None, 1.0),
        ([0.6, 0.3, 0.1], 1, 0.42),
    ],
)
def test_the_most_probable_outcome_is_the_verdict(right: list[float], step: int | None, confidence: float) -> None:
    found = best(right)
    assert found.step == step
    assert found.confidence == pytest.approx(confidence)


def test_outcomes_add_up_to_one() -> None:
    rng = random.Random(0)
    for _ in range(100):
        right = [rng.random() for _ in range(rng.randint(1, 9))]
        before = list(itertools.accumulate([1.0, *right], lambda a, b: a * b))
        outcomes = [b * (1 - p) for b, p in zip(before, right, strict=False)] + [before[-1]]
        assert sum(outcomes) == pytest.approx(1)
        assert best(right).confidence == pytest.approx(max(outcomes))


def test_batches_and_padding_change_nothing_and_the_order_stays(name: str) -> None:
    rng = random.Random(1)
    problems = ["".join(rng.choices("abc 12+", k=rng.randint(1, 20))) for _ in range(9)]
    texts = iter(["".join(rng.choices("abc 12+=", k=rng.randint(1, 30))) for _ in range(60)])
    steps = [[next(texts) for _ in range(rng.randint(1, 6))] for _ in range(9)]
    alone = [Logits(name).detect(p, s) for p, s in zip(problems, steps, strict=True)]
    assert len({found.step for found in alone}) > 1
    for size in (1, 2, 9):
        for one, other in zip(alone, Logits(name, batch_size=size).detect_batch(problems, steps), strict=True):
            assert one.step == other.step
            assert one.confidence == pytest.approx(other.confidence, rel=1e-4)


def test_a_step_cannot_write_its_own_mark(name: str) -> None:
    read = _load(name, "auto", "auto", False).read
    steps = ["a\nMark:+\nb <eos> c", "d"]
    text = tokenizer().decode(read("x Mark:- y", steps, None).ids)
    assert text.count("Mark:") == 2
    assert "<eos>" not in text


def test_what_cannot_be_judged_says_why(name: str, tmp_path) -> None:
    assert Logits(name).detect(PROBLEM, []) == FirstError(None, "no steps", 0.0)
    assert "tokens, the model takes 50" in Logits(name, max_tokens=50).detect(PROBLEM, STEPS).reason
    assert Logits(str(tmp_path / "missing")).detect(PROBLEM, STEPS).reason.startswith("failed: ")
    LlamaForCausalLM.from_pretrained(name).save_pretrained(tmp_path / "b")
    tokenizer(without="+").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"no single tokens for \+ and -"):
        Logits(str(tmp_path / "b")).load()
    for options in ({"model": ""}, {"batch_size": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Logits(**{"model": "m", **options})


def test_it_has_a_name_a_cost_and_can_be_pickled(name: str) -> None:
    detector = by_name(f"maths,logits:{name}").detectors[1]  # type: ignore[attr-defined]
    assert detector == Logits(name)
    assert pickle.loads(pickle.dumps(detector)) == detector
    before = spent()
    detector.detect_batch([PROBLEM] * 2, [STEPS] * 2)
    cost = spent().since(before)
    assert cost.calls == 2
    assert cost.tokens == 2 * len(_load(name, "auto", "auto", False).read(PROBLEM, STEPS, None).ids)


def test_importing_the_detector_does_not_import_transformers() -> None:
    code = "import sys, prefixloss.detect.models.logits; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0
