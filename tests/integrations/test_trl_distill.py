"""Divergences in TRL's trainers: ours against TRL's own, on tensors and in runs of tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import warnings
from collections import Counter
from inspect import signature

import pytest
import torch

pytest.importorskip("trl", reason="these tests run TRL's trainers")
pytest.importorskip("trl.trainer.distillation_trainer", reason="TRL has no trainer for distillation")

from datasets import Dataset
from test_integrations_trl import TEXTS, assert_same_history, history, model, settings, tokenizer, weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.trainer import distillation_trainer

from prefixloss.integrations.trl import distill, patch_trl

BETAS = [0.0, 0.1, 0.5, 1.0]
B, T, D, E, V = 3, 7, 8, 5, 23
PLACES = {place.name: place for place in distill.places()}
# TRL before 1.15 is told how many tokens to take at a time
CHUNKS = {"chunk_size": 4} if "chunk_size" in signature(PLACES["_chunked_divergence_loss"].theirs).parameters else {}
assert len(distill.places()) == 3, "all three places of the installed TRL are understood"


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden(**changes):
    mask = (torch.arange(T) < torch.tensor([[7], [0], [3]])).int()
    return {
        "student_hidden_states": randn(B, T, D, seed=0).requires_grad_(),
        "teacher_hidden_states": randn(B, T, E, seed=1),
        "student_lm_head_weight": randn(V, D, seed=2).requires_grad_(),
        "teacher_lm_head_weight": randn(V, E, seed=3),
        "completion_mask": mask,
        **CHUNKS,
        **changes,
    }


def results(function, given):
    """What it returns and the gradients."""
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = function(**given)
    out = out if isinstance(out, tuple) else (out,)
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0], leaves)]


def assert_same(place, make):
    """float32 sums of 23 terms of size 1, in two orders."""
    theirs = results(place.theirs, make())
    for a, b in zip(results(place.ours(place.theirs, "auto"), make()), theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_items_in_batch": 5, "temperature": 1.7},
        {"num_items_in_batch": torch.tensor(5), "student_lm_head_bias": randn(V, seed=4).requires_grad_()},
        {"teacher_lm_head_bias": randn(V, seed=5), "student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
        {"student_final_logit_softcapping": 2.0, "teacher_final_logit_softcapping": 2.0, "temperature": 0.6},
        {"completion_mask": torch.zeros(B, T).int()},
    ],
)
def test_of_hidden_states_it_is_trls(beta, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these falls back
        assert_same(PLACES["_chunked_divergence_loss"], lambda: hidden(beta=beta, **changes))


def test_softcaps_that_differ_stay_trls():
    place = PLACES["_chunked_divergence_loss"]
    made = lambda: hidden(beta=0.5, student_final_logit_softcapping=2.0)
    with pytest.warns(UserWarning, match="student and teacher have other softcaps: TRL's own divergence is used"):
        got = results(place.ours(place.theirs, "auto"), made())
    for a, b in zip(got, results(place.theirs, made()), strict=True):
        assert torch.equal(a, b)


def logits(**changes):
    labels = torch.where(hidden()["completion_mask"] == 1, 4, -100)
    given = {"student_logits": randn(B, T, V, seed=6).requires_grad_(), "teacher_logits": randn(B, T, V, seed=7)}
    return {**given, "labels": labels, **changes}


OF_LOGITS = [place for place in distill.places() if place.name == "generalized_jsd_loss"]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("place", OF_LOGITS, ids=["gkd", "gold"])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.6},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7.0), "reduction": "none"},
        {"reduction": "sum"},
        {"labels": None},
        {"labels": torch.full((B, T), -100)},
    ],
)
def test_of_logits_it_is_trls(beta, place, changes, monkeypatch):
    calls = counted(monkeypatch)
    assert_same(place, lambda: logits(beta=beta, **changes))
    assert calls["distill_loss"] == 1


@pytest.mark.parametrize(
    ("place", "changes"),
    [(place, {"reduction": name}) for place in OF_LOGITS for name in ("none", "mean")]
    + [(OF_LOGITS[1], {"logits_are_probs": True})],
)
def test_what_is_no_reduced_divergence_of_logits_stays_trls(place, changes, monkeypatch):
    calls = counted(monkeypatch)
    given = logits(student_logits=randn(B, T, V, seed=6).softmax(-1), teacher_logits=randn(B, T, V, seed=7).softmax(-1))
    ours = place.ours(place.theirs, "auto")
    assert torch.equal(ours(**given, **changes), place.theirs(**given, **changes))
    assert not calls


def counted(monkeypatch):
    """Calls of our losses from TRL's places."""
    calls = Counter()
    for name in ("linear_distill_loss", "distill_loss"):
        own = getattr(distill, name)

        def call(*args, own=own, name=name, **kwargs):
            calls[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(distill, name, call)
    return calls


# ---- runs

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def speaker():
    """The tokenizer of the other tests, made of bytes, as GOLD asks."""
    made = tokenizer()
    bytes_of = {" ": "\u0120", "\n": "\u010a"}
    vocabulary = {bytes_of.get(token, token): i for token, i in made.get_vocab().items()}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        chat_template=TEMPLATE,
    )  # fmt: skip


def teacher():
    """Of another width than the student."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def talks():
    says = lambda question, answer: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Dataset.from_dict({"messages": [says(text, text[::-1]) for text in TEXTS] * 2})


SIZES = {"per_device_train_batch_size": 4, "max_steps": 2}


def gkd(tmp_path):
    options = settings(tmp_path, max_new_tokens=6, lmbda=0.5, beta=0.3, max_length=64, **SIZES)
    return GKDTrainer(
        model=model(tmp_path), teacher_model=teacher(), args=GKDConfig(**options), train_dataset=talks(),
        processing_class=speaker(),
    )  # fmt: skip


def gold(tmp_path):
    options = settings(tmp_path, max_completion_length=6, lmbda=0.0, beta=0.3, max_length=64, **SIZES)
    return GOLDTrainer(
        model=model(tmp_path), teacher_model=teacher(), args=GOLDConfig(**options), train_dataset=talks(),
        processing_class=speaker(),
    )  # fmt: skip


def distillation(tmp_path):
    options = settings(tmp_path, max_completion_length=6, beta=1.0, **SIZES)
    return DistillationTrainer(
        model=model(tmp_path), teacher_model=teacher(), args=DistillationConfig(**options),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}), processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name"),
    [(gkd, "distill_loss"), (gold, "distill_loss"), (distillation, "linear_distill_loss")],
    ids=["gkd", "gold", "distillation"],
)
def test_a_run_is_trls_run(make, name, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    plain = make(tmp_path)
    before = history(plain)
    assert not calls
    with patch_trl():
        patched = make(tmp_path)
        after = history(patched)
    assert calls[name] >= 2  # a step each
    assert_same_history(before, after)
    torch.testing.assert_close(weights(plain), weights(patched), rtol=1e-3, atol=1e-3)


# ---- putting it in place


def test_it_is_undone():
    own = (distillation_trainer._chunked_divergence_loss, GKDTrainer.generalized_jsd_loss)
    with patch_trl():
        assert distillation_trainer._chunked_divergence_loss is not own[0]
        assert GKDTrainer.generalized_jsd_loss is not own[1]
    assert (distillation_trainer._chunked_divergence_loss, GKDTrainer.generalized_jsd_loss) == own


@pytest.fixture
def looks_anew():
    distill.places.cache_clear()
    yield
    distill.places.cache_clear()


def other_parameters(student_logits, teacher_logits, weights):
    raise AssertionError("it is not called")


def another_divergence(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    return GKD_OWN(student_logits, teacher_logits, labels, beta, temperature, reduction) * 1.05


def another_shape(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    return GKD_OWN(student_logits, teacher_logits, labels, beta, temperature, reduction)[None]


def broken(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    raise RuntimeError("no driver")


GKD_OWN = GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (other_parameters, "takes student_logits, teacher_logits, weights"),
        (another_divergence, "differs from ours at beta=0 by 0"),
        (another_shape, r"gives results of shapes \[\[1\], \[2, 3, 19\]\]"),
        (broken, r"does not run on this machine \(no driver\)"),
    ],
)
def test_what_is_not_understood_is_left_as_it_is(function, message, monkeypatch, looks_anew):
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(function))
    with pytest.warns(UserWarning, match=rf"GKDTrainer.generalized_jsd_loss {message}.*: it is left as it is"):
        assert len(distill.places()) == 2
    with patch_trl():
        assert GKDTrainer.generalized_jsd_loss is function
        assert GOLDTrainer.generalized_jsd_loss is not OF_LOGITS[1].theirs


def test_what_this_trl_does_not_have_is_not_missed(monkeypatch, looks_anew):
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    monkeypatch.delattr(GOLDTrainer, "generalized_jsd_loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [place.holder for place in distill.places()] == [GKDTrainer]
