"""The process reward model: a tiny one whose rewards are computed by hand, and random ones for what must not matter."""

import importlib
import math
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from prefixloss.detect.base import FirstError
from prefixloss.detect.models import prm
from prefixloss.detect.models.prm import PRM
from prefixloss.detect.models.reading import STEPS

SEPARATOR = "<extra_0>"
WORDS = ["good", "bad", "so", "then", "hence", "2", "+", "=", "x", "problem", "system", "user", "assistant"]
SPECIAL = ["<pad>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>", SEPARATOR]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
SIZE = 32  # hidden; a dimension a word
LIMIT = 200  # tokens that the models take
CHAT = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }}<|im_end|> {% endfor %}"


def tokenizer(chat: str | None = CHAT, separator: bool = True, **options: object) -> PreTrainedTokenizerFast:
    """A token a word; with a <bos> where special tokens are asked for."""
    known = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    if separator:
        known.add_tokens([AddedToken(SEPARATOR, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=known,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **options,
    )
    fast.chat_template = chat
    return fast


def sizes(**options: object) -> dict:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": SIZE,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": LIMIT,
        "pad_token_id": 0,
        "num_labels": 2,
        **options,
    }


def known_model() -> LlamaForTokenClassification:
    """Attention is the mean over all tokens so far, and the head counts "bad" against "good" in it."""
    model = LlamaForTokenClassification(LlamaConfig(**sizes()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), SIZE))
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight.copy_(torch.eye(SIZE))
        attention.o_proj.weight.copy_(torch.eye(SIZE))
        model.score.weight[1, VOCABULARY["good"]] = 2
        model.score.weight[1, VOCABULARY["bad"]] = -3
        model.score.bias.copy_(torch.tensor([0.25, 1.0]))
    return model


def known_rewards(ids: list[int]) -> list[float]:
    """The same in float64, by hand, at each separator. A one-hot vector's root mean square is 1 / sqrt(SIZE)."""
    eps = 1e-6
    one_hot = np.eye(len(VOCABULARY), SIZE)
    rewards = []
    for place, token in enumerate(ids):
        if token == VOCABULARY[SEPARATOR]:
            mean = one_hot[ids[: place + 1]].mean(0) / math.sqrt(1 / SIZE + eps)
            state = one_hot[token] + mean
            state /= math.sqrt((state**2).mean() + eps)
            margin = 2 * state[VOCABULARY["good"]] - 3 * state[VOCABULARY["bad"]] + 1.0 - 0.25
            rewards.append(1 / (1 + math.exp(-margin)))
    return rewards


def ids_of(problem: str, steps: list[str]) -> list[int]:
    response = f" {SEPARATOR} ".join([*steps, ""])
    text = f"<|im_start|> user {problem} <|im_end|> <|im_start|> assistant {response} <|im_end|>"
    return [VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in text.split()]


def expected(problem: str, steps: list[str], threshold: float = 0.8) -> tuple[int | None, float]:
    rewards = known_rewards(ids_of(problem, steps))
    assert len(rewards) == len(steps)
    first = next((k for k, reward in enumerate(rewards) if reward < threshold), None)
    return first, min(rewards) if first is None else 1 - rewards[first]


def save(folder: Path, model: torch.nn.Module, tokens: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("known"), known_model(), tokenizer())


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> str:
    """Every reward is the same: the softmax of logits 0 and log 4, which is 0.8."""
    model = known_model()
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.copy_(torch.tensor([0.0, math.log(4)]))
    return save(tmp_path_factory.mktemp("constant"), model, tokenizer())


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def random_model(request, tmp_path_factory) -> str:
    torch.manual_seed(0)
    if request.param == "causal":
        model = LlamaForTokenClassification(LlamaConfig(**sizes(num_hidden_layers=2, initializer_range=0.5)))
    else:
        model = BertForTokenClassification(BertConfig(**sizes(num_hidden_layers=2, initializer_range=0.5)))
    return save(tmp_path_factory.mktemp(request.param), model, tokenizer())


def responses(count: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Problems and steps of very different lengths."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(["good", "good", "bad", "so", "then", "2", "x"], k=rng.randint(1, most)))

    return [text(9) for _ in range(count)], [[text(12) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def close(found: list[FirstError], others: list[FirstError]) -> bool:
    assert len(found) == len(others)
    return all(
        a.step == b.step and a.confidence == pytest.approx(b.confidence, abs=1e-5)
        for a, b in zip(found, others, strict=True)
    )


# ---- rewards


def test_rewards_are_those_of_the_model_at_the_separators(known):
    problems, steps = responses(60)
    found = PRM(known).detect_batch(problems, steps)
    right = [expected(p, s) for p, s in zip(problems, steps, strict=True)]
    assert {step for step, _ in right} >= {None, 0, 1, 2}
    assert [f.step for f in found] == [step for step, _ in right]
    assert [f.confidence for f in found] == pytest.approx([confidence for _, confidence in right], abs=1e-5)


def test_the_reason_gives_the_reward(known):
    (reward,) = known_rewards(ids_of("x", ["bad bad"]))
    found = PRM(known).detect("x", ["bad bad"])
    assert found.reason == f"reward {reward:.4g} is below 0.8"
    (reward,) = known_rewards(ids_of("x", ["good good"]))
    assert PRM(known, threshold=0.5).detect("x", ["good good"]).reason == f"every reward is at least {reward:.4g}"


def test_other_labels_can_be_the_positive_one(known):
    (reward,) = known_rewards(ids_of("x", ["good"]))
    found = PRM(known, positive_label=0).detect("x", ["good"])
    assert (found.step, found.confidence) == (0, pytest.approx(reward, abs=1e-5))


def test_a_reward_of_exactly_the_threshold_is_no_error(constant):
    found = PRM(constant, threshold=0.8).detect("x", ["good", "bad"])
    assert (found.step, found.confidence) == (None, pytest.approx(0.8, abs=1e-7))
    reward = found.confidence
    assert PRM(constant, threshold=reward).detect("x", ["good"]).step is None
    assert PRM(constant, threshold=math.nextafter(reward, 1)).detect("x", ["good"]).step == 0


def test_a_system_prompt_is_read_and_without_one_the_template_decides(known):
    def rewards(ids: list[int]) -> float:
        return min(known_rewards(ids))

    system = [VOCABULARY[w] for w in ["<|im_start|>", "system", "bad", "bad", "<|im_end|>"]]
    plain = ids_of("x", ["good"])
    settings = {"threshold": 1e-9}
    assert PRM(known, **settings).detect("x", ["good"]).confidence == pytest.approx(rewards(plain), abs=1e-5)
    with_system = PRM(known, system="bad bad", **settings).detect("x", ["good"])
    assert with_system.confidence == pytest.approx(rewards(system + plain), abs=1e-5)
    assert abs(rewards(system + plain) - rewards(plain)) > 0.01


def test_without_a_chat_template_the_problem_and_the_steps_follow_the_first_special_token(tmp_path):
    name = save(tmp_path, known_model(), tokenizer(chat=None))
    ids = [VOCABULARY[w] for w in f"<bos> bad x good {SEPARATOR} so {SEPARATOR}".split()]
    found = PRM(name, threshold=1e-9).detect("bad x", ["good", "so"])
    assert found.confidence == pytest.approx(min(known_rewards(ids)), abs=1e-5)
    with_system = [VOCABULARY[w] for w in f"<bos> bad good {SEPARATOR}".split()]
    found = PRM(name, system="bad", threshold=1e-9).detect("", ["good"])
    assert found.confidence == pytest.approx(known_rewards(with_system)[0], abs=1e-5)


# ---- batches


def test_batching_and_padding_change_nothing(random_model):
    problems, steps = responses(25)
    alone = [PRM(random_model, batch_size=1).detect(p, s) for p, s in zip(problems, steps, strict=True)]
    assert len({round(f.confidence, 4) for f in alone}) > 20
    for size in (2, 7, 100):
        assert close(PRM(random_model, batch_size=size).detect_batch(problems, steps), alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_changes_nothing(tmp_path, side):
    name = save(tmp_path, known_model(), tokenizer(padding_side=side))
    problems, steps = responses(20)
    found = PRM(name).detect_batch(problems, steps)
    right = [expected(p, s) for p, s in zip(problems, steps, strict=True)]
    assert close(found, [FirstError(step, "", confidence) for step, confidence in right])


def test_results_keep_the_order_of_the_responses(random_model):
    problems, steps = responses(25)
    order = random.Random(1).sample(range(25), 25)
    found = PRM(random_model).detect_batch(problems, steps)
    shuffled = PRM(random_model).detect_batch([problems[i] for i in order], [steps[i] for i in order])
    assert close(shuffled, [found[i] for i in order])


def test_a_batch_holds_inputs_of_like_length(known, monkeypatch):
    batches = []
    rewards = prm._Loaded.rewards

    def watched(self, batch, label):
        batches.append([len(one.ids) for one in batch])
        return rewards(self, batch, label)

    monkeypatch.setattr(prm._Loaded, "rewards", watched)
    PRM(known, batch_size=4).detect_batch(*responses(11))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4


def test_an_empty_batch_and_a_response_without_steps_are_answered(known):
    assert PRM(known).detect_batch([], []) == []
    nothing, one = PRM(known).detect_batch(["x", "x"], [[], ["good"]], [None, "2"])
    assert nothing == (None, "no steps", 0.0)
    assert one.confidence > 0


# ---- length


# a chat of one step has 8 more tokens than the step has words, with the problem "x"


@pytest.mark.parametrize("words", [LIMIT - 9, LIMIT - 8])
def test_an_input_up_to_the_models_limit_is_read(known, words):
    step = "good " * words
    assert len(ids_of("x", [step])) == words + 8
    problems, steps = responses(6)
    found = PRM(known).detect_batch([*problems, "x"], [*steps, [step]])
    assert (found[-1].step, found[-1].confidence) == (None, pytest.approx(expected("x", [step])[1], abs=1e-5))
    assert close(found[:-1], PRM(known).detect_batch(problems, steps))


@pytest.mark.parametrize("words", [LIMIT - 7, 100_000])
def test_a_longer_input_says_how_long_it_is_and_the_others_are_read(known, words):
    problems, steps = responses(6)
    found = PRM(known).detect_batch(["x", *problems], [["good " * words], *steps])
    assert found[0] == (None, f"{words + 8} tokens, the model takes {LIMIT}", 0.0)
    assert close(found[1:], PRM(known).detect_batch(problems, steps))


@pytest.mark.parametrize(("most", "limit"), [(20, 20), (None, LIMIT), (10_000, LIMIT)])
def test_max_tokens_only_lowers_the_models_limit(known, most, limit):
    fits, longer = (["good " * (limit - 8 + k)] for k in (0, 1))
    found = PRM(known, max_tokens=most).detect_batch(["x", "x"], [fits, longer])
    assert found[0].confidence > 0
    assert found[1] == (None, f"{limit + 1} tokens, the model takes {limit}", 0.0)


def test_the_tokenizers_limit_counts_too(tmp_path):
    name = save(tmp_path, known_model(), tokenizer(model_max_length=20))
    assert PRM(name).detect("x", ["good " * 13]).reason == "21 tokens, the model takes 20"


# ---- separators


@pytest.mark.parametrize("mark", [SEPARATOR, f"{SEPARATOR}{SEPARATOR}", "<|im_end|>", "<pad>", STEPS])
def test_separators_and_special_tokens_in_the_text_are_read_as_spaces(known, mark):
    problem, steps = f"x {mark} 2", [f"good{mark}good", f"{mark}bad bad{mark}bad", f"good{mark}", mark]
    plain = ["good good", "bad bad bad", "good", ""]
    right = known_rewards(ids_of("x 2", plain))
    assert len(right) == 4
    assert right[1] == min(right) < right[0]
    for k, threshold in ((None, right[1] - 1e-3), (1, right[1] + 1e-3), (0, 1.0)):
        found = PRM(known, threshold=threshold).detect(problem, steps)
        assert found.step == k
        wanted = min(right) if k is None else 1 - right[k]
        assert found.confidence == pytest.approx(wanted, abs=1e-5)


def test_a_separator_that_forms_where_another_was_cut_out_is_no_boundary(known):
    found = PRM(known).detect("x", [f"<extra{SEPARATOR}_0> good good good good", "bad bad bad bad"])
    assert found.step == expected("x", ["<extra _0> good good good good", "bad bad bad bad"])[0] == 1


def test_an_ordinary_token_can_be_the_separator(known):
    name = PRM(known, separator="hence", threshold=1e-9)
    assert name.detect("x", ["good", "so hence then"]).confidence > 0
    ordinary, text = prm._load(known, "auto", "auto", False), "so hence then"
    read = ordinary.read("x", ["good", text], "hence", None)
    assert [read.ids[i] for i in read.ends] == [VOCABULARY["hence"]] * 2
    assert read.ids.count(VOCABULARY["hence"]) == 2


@pytest.mark.parametrize("separator", ["<extra_1>", "so then", "<unk>", " "])
def test_a_separator_that_is_no_single_token_is_named_before_any_work_or_as_the_reason(known, separator):
    wrong = PRM(known, separator=separator)
    with pytest.raises(ValueError, match=rf"^separator: got '{separator}', expected one token"):
        wrong.load()
    with pytest.raises(ValueError, match=r"^separator: "):
        wrong.find("x", ["good"], None)
    found = wrong.detect_batch(["x", "x"], [["good"], ["bad"]])
    assert [(f.step, f.confidence) for f in found] == [(None, 0.0)] * 2
    assert found[0].reason.startswith(f"failed: ValueError: separator: got '{separator}'")


# ---- what goes wrong


def test_a_response_that_cannot_be_read_does_not_cost_the_others(known):
    problems, steps = responses(4)
    found = PRM(known).detect_batch(["x", *problems, "x"], [["good \ud800"], *steps, [None]])
    assert close(found[1:-1], PRM(known).detect_batch(problems, steps))
    for failed in (found[0], found[-1]):
        assert (failed.step, failed.confidence) == (None, 0.0)
        assert failed.reason.startswith("failed: ")


def test_a_batch_that_fails_is_tried_one_by_one(known, monkeypatch):
    problems, steps = responses(7)
    right = PRM(known).detect_batch(problems, steps)
    rewards = prm._Loaded.rewards
    longest = max(len(ids_of(p, s)) for p, s in zip(problems, steps, strict=True))

    def short_of_memory(self, batch, label):
        if sum(len(one.ids) for one in batch) >= longest:
            raise torch.OutOfMemoryError("too much")
        return rewards(self, batch, label)

    monkeypatch.setattr(prm._Loaded, "rewards", short_of_memory)
    found = PRM(known, batch_size=7).detect_batch(problems, steps)
    lost = [i for i, (p, s) in enumerate(zip(problems, steps, strict=True)) if len(ids_of(p, s)) == longest]
    assert [i for i, f in enumerate(found) if f.confidence == 0] == lost
    assert all(found[i] == (None, "failed: OutOfMemoryError: too much", 0.0) for i in lost)
    kept = [i for i in range(7) if i not in lost]
    assert close([found[i] for i in kept], [right[i] for i in kept])


def test_rewards_that_are_not_finite_are_no_all_right(tmp_path):
    model = known_model()
    with torch.no_grad():
        model.score.bias[1] = math.nan
    name = save(tmp_path, model, tokenizer())
    assert PRM(name).detect("x", ["good"]) == (None, "failed: the rewards are not finite", 0.0)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    name = save(tmp_path, LlamaModel(LlamaConfig(**sizes())), tokenizer())
    with pytest.raises(ValueError, match=r"^model: .* is no token classifier: it has no score"):
        PRM(name).load()
    assert PRM(name).detect("x", ["good"]).confidence == 0
    bare = save(tmp_path / "bert", BertModel(BertConfig(**sizes())), tokenizer())
    assert PRM(bare).detect("x", ["good"]).reason.startswith("failed: ValueError: model: ")


def test_a_model_that_is_not_there_is_a_reason(tmp_path):
    found = PRM(str(tmp_path / "nothing")).detect_batch(["x", "x"], [["good"], ["bad"]])
    assert [(f.step, f.confidence) for f in found] == [(None, 0.0)] * 2


def test_a_label_that_the_model_does_not_have_is_named(known):
    with pytest.raises(ValueError, match=r"^positive_label: got 2, the model has 2 labels"):
        PRM(known, positive_label=2).load()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", ""), ("separator", ""), ("threshold", 0.0), ("threshold", 1.01), ("threshold", math.nan)]
    + [("positive_label", -1), ("batch_size", 0), ("max_tokens", 0)],
)
def test_settings_that_cannot_work_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got"):
        PRM(**{"model": "m", name: value})


# ---- loading


def test_the_model_is_loaded_once_a_process_and_not_pickled(known, monkeypatch):
    prm._load.cache_clear()
    loads = []
    kind = prm._model_class
    monkeypatch.setattr(prm, "_model_class", lambda *a: loads.append(a) or kind(*a))
    detector = PRM(known)
    assert loads == []
    found = []
    threads = [threading.Thread(target=lambda: found.append(detector.detect("x", ["bad"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pickled = pickle.dumps(detector)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again == detector
    assert found == [again.detect("x", ["bad"])] * 4
    assert PRM(known, threshold=0.1).detect("x", ["bad"]).confidence > 0
    assert len(loads) == 1


def test_qwens_own_class_is_known_without_running_its_code(tmp_path):
    torch.manual_seed(0)
    model = prm._qwen_class()(Qwen2Config(**sizes()))
    head = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.ReLU(), torch.nn.Linear(SIZE, 2))
    model.score.load_state_dict({name: torch.randn_like(p) for name, p in head.state_dict().items()})
    name = save(tmp_path, model, tokenizer())
    assert Qwen2Config.from_pretrained(name).architectures == ["Qwen2ForProcessRewardModel"]
    ids, ends = prm._load(name, "auto", "auto", False).read("x", ["good bad", "so"], SEPARATOR, None)
    with torch.no_grad():
        states = model.eval().model(torch.tensor([ids])).last_hidden_state
        rewards = model.score[2](model.score[1](model.score[0](states))).softmax(-1)[0, :, 1]
    wanted = rewards[ends].min().item()
    assert PRM(name, threshold=1e-9).detect("x", ["good bad", "so"]).confidence == pytest.approx(wanted, abs=1e-5)


FOREIGN = """
import torch
from transformers import LlamaConfig, LlamaPreTrainedModel

class Foreign(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.logits = torch.nn.Parameter(torch.zeros(2))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return (self.logits.expand(*input_ids.shape, 2),)
"""


def test_a_models_own_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    foreign = importlib.import_module("foreign").Foreign
    foreign.register_for_auto_class("AutoModel")
    name = save(tmp_path / "model", foreign(LlamaConfig(**sizes())), tokenizer())
    refused = PRM(name).detect("x", ["good"])
    assert refused.confidence == 0
    assert refused.reason.startswith("failed: ValueError: model: ")
    found = PRM(name, trust_remote_code=True).detect("x", ["good"])
    assert (found.step, found.confidence) == (0, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_can_be_chosen(known, dtype):
    detector = PRM(known, dtype=dtype, device="cpu")
    problems, steps = responses(10)
    found = detector.detect_batch(problems, steps)
    assert prm._load(known, "cpu", dtype, False).model.dtype == getattr(torch, dtype)
    right = [expected(p, s)[0] for p, s in zip(problems, steps, strict=True)]
    assert sum(f.step == r for f, r in zip(found, right, strict=True)) >= 8


def test_importing_the_detector_does_not_import_transformers():
    code = "import sys, prefixloss.detect.models.prm; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
