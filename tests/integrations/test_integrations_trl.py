"""TRL's own trainers, on the CPU and offline, with and without us: a tiny random Llama, a tiny tokenizer."""

# ruff: noqa: E402 (TRL may be missing)

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="these tests run TRL's trainers")

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils

from prefixloss.detect.base import Detector, FirstError
from prefixloss.inputs.turns import turn_counts, turns
from prefixloss.integrations.trl import LogProbs, PrefixGRPOTrainer, patch_trl
from prefixloss.integrations.trl.logps import OPTIONAL
from prefixloss.integrations.trl.trainer import _question, _scored_index

TRL_FUNCTION = utils._ChunkedLogProbFunction
TEXTS = ["1 + 2 = 3\n", "so it is 4.\n", "What is 7 - 3?", "Step 1: 5 + 5 = 10\nStep 2: done"]


def tokenizer():
    """Single characters, so that any token sequence is a text."""
    letters = sorted({c for text in TEXTS for c in text} | set("0123456789abcdefghijklmnopqrstuvwxyz"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(tmp_path, **options):
    """Loaded from a directory, where TRL finds its reference model too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None, **options,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return LlamaForCausalLM.from_pretrained(tmp_path / "model")


def settings(tmp_path, **options):
    return {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "seed": 3, "learning_rate": 1e-2, **options,
    }  # fmt: skip


def vowels(completions, **_):
    """A reward that any model earns now and then, and not always."""
    return [float(sum(c in "aeiou0123" for c in text) % 2) for text in completions]


def grpo(tmp_path, cls=GRPOTrainer, funcs=vowels, extra=None, **options):
    made = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12, "max_steps": 10,
        "temperature": 0.9, **options,
    }  # fmt: skip
    prompts = Dataset.from_dict({"prompt": TEXTS * 4, "answer": ["3", "4", "4", "10"] * 4})
    return cls(
        model=model(tmp_path), reward_funcs=funcs, args=GRPOConfig(**settings(tmp_path, **made)), train_dataset=prompts,
        processing_class=tokenizer(), **(extra or {}),
    )  # fmt: skip


def history(trainer):
    """What a run logged, but for the times."""
    trainer.train()
    skip = ("time", "runtime", "second", "flos", "mfu")
    return [{k: v for k, v in log.items() if not any(s in k for s in skip)} for log in trainer.state.log_history]


def assert_same_history(a, b, names=None, **tolerance):
    assert len(a) == len(b) > 1
    for x, y in zip(a, b, strict=True):
        shared = set(x) & set(y) if names is None else names & set(x)
        assert shared
        for name in shared:
            assert y[name] == pytest.approx(x[name], **{"rel": 2e-4, "abs": 2e-6, **tolerance}), name
        if names is None:
            assert set(x) <= set(y)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---- the function ------------------------------------------------------------------------------------------


def inputs_of_function(seed, dtype=torch.float32, tokens=37, bias=True):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 24, generator=g), torch.randn(101, 24, generator=g)
    b = torch.randn(101, generator=g) if bias else None
    made = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)]
    return made, torch.randint(101, (tokens,), generator=g)


def exact(made, targets, temperature, softcap, scale):
    """The five results from dense float64 logits."""
    hidden, weight, bias = (None if x is None else x.detach().double().requires_grad_() for x in made)
    z = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    results = (
        logp.gather(1, targets[:, None])[:, 0],
        entropy,
        (2 * logp).logsumexp(1),
        z.mean(1),
        z.argmax(1) == targets,
    )
    return results, [x for x in (hidden, weight, bias) if x is not None]


CASES = list(itertools.product([1.0, 0.7], [None, 4.0], [1.0, 0.6], [True, False]))


@pytest.mark.parametrize(("temperature", "softcap", "scale", "bias"), CASES)
def test_all_five_results_and_the_gradients_are_those_of_trl_and_of_float64(temperature, softcap, scale, bias):
    made, targets = inputs_of_function(0, bias=bias)
    given = (*made, targets, temperature, 32, softcap, scale)
    ours, theirs = LogProbs().apply(*given), TRL_FUNCTION.apply(*given)
    truth, doubles = exact(made, targets, temperature, softcap, scale)
    for x, y, t in zip(ours, theirs, truth, strict=True):
        assert x.dtype == y.dtype
        assert x.requires_grad == y.requires_grad
        if x.dtype == torch.bool:
            assert torch.equal(x, y)
            assert torch.equal(x, t)
        else:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(x.double(), t, rtol=1e-5, atol=1e-5)
    singles = [x for x in made if x is not None]
    g, h = torch.randn(2, len(targets)).unbind()
    grads = [torch.autograd.grad((r[0] * g + r[1] * h).sum(), singles) for r in (ours, theirs)]
    true = torch.autograd.grad((truth[0] * g + truth[1] * h).sum(), doubles)
    for x, y, t in zip(*grads, true, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(x.double(), t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [(), ("entropy",), ("is_top1",), ("log_probs", "entropy", "mean_logits")])
def test_only_what_is_asked_for_is_made(wanted):
    made, targets = inputs_of_function(1)
    given = (*made, targets, 1.0, 32, None, 1.0, wanted)
    pairs = zip(LogProbs().apply(*given), TRL_FUNCTION.apply(*given), strict=True)
    assert [x is None for x, _ in pairs] == [False, *(n not in wanted for n in OPTIONAL)]


def test_half_precision_is_nearer_to_float64_than_trl():
    made, targets = inputs_of_function(2, torch.bfloat16, tokens=400)
    given = (*made, targets, 1.0, 32)
    truth, _ = exact(made, targets, 1.0, None, 1.0)
    for name in range(4):
        ours, theirs = (
            (f(*given)[name].double() - truth[name]).abs().max() for f in (LogProbs().apply, TRL_FUNCTION.apply)
        )
        assert ours < 0.02 * theirs


def test_under_autocast_it_is_the_function_of_the_rounded_inputs():
    made, targets = inputs_of_function(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (f(*made, targets, 1.0, 32) for f in (LogProbs().apply, TRL_FUNCTION.apply))
    truth, _ = exact([x.bfloat16() for x in made], targets, 1.0, None, 1.0)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.02, atol=0.2)
    grads = torch.autograd.grad(ours[0].sum(), made)
    assert all(g.dtype == torch.float32 for g in grads)


def test_no_token_is_a_differentiable_zero():
    made, targets = inputs_of_function(4, tokens=0)
    out = LogProbs().apply(*made, targets, 1.0, 32)
    assert [len(x) for x in out] == [0] * 5
    assert not torch.autograd.grad(out[0].sum(), made[1])[0].any()


def test_the_statistics_come_a_chunk_at_a_time(monkeypatch):
    made, targets = inputs_of_function(5)
    whole = LogProbs().apply(*made, targets, 1.0, 32)
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(5 * 3 * 101 * 4))
    for x, y in zip(whole, LogProbs().apply(*made, targets, 1.0, 32), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# ---- the patch ---------------------------------------------------------------------------------------------


def test_a_head_sharded_by_deepspeed_is_left_to_trl(monkeypatch):
    """Which gathers it again in its backward."""
    made, targets = inputs_of_function(6)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.warns(UserWarning, match="ZeRO-3: TRL's own log-probs are used"):
        ours = LogProbs().apply(*made, targets, 1.0, 32)
    for x, y in zip(ours, TRL_FUNCTION.apply(*made, targets, 1.0, 32), strict=True):
        assert torch.equal(x, y)


def bound():
    """What all of TRL's names for its function stand for."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "trl"]
    names = ("ChunkedLogProbFunction", "_ChunkedLogProbFunction")
    found = [vars(m)[name] for m in modules for name in names if name in vars(m)]
    assert len(found) > 2
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 2, 1, 1)])
def test_patches_are_undone_in_any_order_and_more_than_once(order):
    undo = [patch_trl(name) for name in ("auto", "torch", "reference")]
    left = ["auto", "torch", "reference"]
    for i in order:
        assert bound().backend == left[-1]
        undo[i]()
        name = ("auto", "torch", "reference")[i]
        left = [x for x in left if x != name]
        if not left:
            break
    assert bound() is TRL_FUNCTION


def test_a_patch_is_a_context_that_survives_an_error():
    def fail():
        with patch_trl("torch"):
            assert isinstance(bound(), LogProbs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert bound() is TRL_FUNCTION


# ---- unmodified trainers -----------------------------------------------------------------------------------


def dpo(tmp_path):
    pairs = {"prompt": TEXTS, "chosen": ["yes 1", "yes 22", "ok 4", "done"], "rejected": ["no", "no 3", "not 4", "10"]}
    return DPOTrainer(
        model=model(tmp_path), ref_model=model(tmp_path), train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        args=DPOConfig(**settings(tmp_path, max_steps=2, per_device_train_batch_size=4)),
    )  # fmt: skip


def sft(tmp_path):
    return SFTTrainer(
        model=model(tmp_path, final_logit_softcapping=5.0), train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(), args=SFTConfig(**settings(tmp_path, max_steps=2, per_device_train_batch_size=4)),
    )  # fmt: skip


def rloo(tmp_path):
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    return RLOOTrainer(
        model=model(tmp_path), reward_funcs=vowels, processing_class=tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}), args=RLOOConfig(**settings(tmp_path, **options)),
    )  # fmt: skip


@pytest.mark.parametrize("make", [grpo, rloo, dpo, sft], ids=["grpo", "rloo", "dpo", "sft"])
def test_a_trainer_runs_the_same_under_the_patch(make, tmp_path, monkeypatch):
    plain = make(tmp_path)
    before = history(plain)
    calls = Counter()
    apply = LogProbs.apply

    def counted(self, *args, **named):
        calls["ours"] += 1
        return apply(self, *args, **named)

    monkeypatch.setattr(LogProbs, "apply", counted)
    with patch_trl():
        patched = make(tmp_path)
        after = history(patched)
    assert calls["ours"] > 0
    assert_same_history(before, after)
    torch.testing.assert_close(weights(plain), weights(patched), rtol=1e-3, atol=1e-3)


# ---- the fused loss ----------------------------------------------------------------------------------------

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


def skip_luspo(loss_type):
    """TRL 1.9's counts padding, and is refused."""
    if loss_type == "luspo" and trl.__version__.startswith("1.9."):
        pytest.skip("another loss in this TRL")


def micro_batch(trainer, seed=0, per_token=True):
    """A micro-batch as TRL hands it to its loss: left-padded prompts, right-padded completions, one without a token."""
    g = torch.Generator().manual_seed(seed)
    vocabulary = len(trainer.processing_class)
    shape = (5, 9)
    lengths = torch.tensor([9, 4, 0, 7, 1])
    mask = (torch.arange(9) < lengths[:, None]).int()
    logps = -4 + 0.5 * torch.randn(shape, generator=g)
    return {
        "prompt_ids": torch.randint(3, vocabulary, (5, 6), generator=g),
        "prompt_mask": (torch.arange(6) >= torch.tensor([0, 2, 5, 1, 3])[:, None]).int(),
        "completion_ids": torch.randint(3, vocabulary, shape, generator=g),
        "completion_mask": mask,
        "tool_mask": (torch.rand(shape, generator=g) < 0.8).int(),
        "advantages": torch.randn(shape if per_token else (5,), generator=g).round(decimals=0),
        "old_per_token_logps": logps,
        "ref_per_token_logps": logps + 0.3 * torch.randn(shape, generator=g),
        "importance_sampling_ratio": 2 * torch.rand(shape, generator=g),
        "num_items_in_batch": torch.tensor(57),
    }


def loss_and_gradients(trainer, inputs, fused):
    trainer.fused_loss = fused
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters()}, metrics


def gpt2(tmp_path):
    """In place of `model`: positions are absolute."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer()), n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return GPT2LMHeadModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("fused", [False, True], ids=["log-probs", "loss"])
def test_absolute_positions_are_those_of_generation(fused, tmp_path, monkeypatch):
    """Prompts are padded on the left; each response is scored as if it were alone. TRL's own counts the padding."""
    monkeypatch.setitem(globals(), "model", gpt2)
    trainer = grpo(tmp_path, PrefixGRPOTrainer, extra={"fused_loss": fused}, beta=0.1, temperature=1.0)
    inputs = micro_batch(trainer)
    inputs.pop("importance_sampling_ratio")
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    made = []
    ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 9)[0]
    theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, 9)[0]
    for i in range(5):
        length, seen_ids = int(inputs["completion_mask"][i].sum()), ids[i][mask[i].bool()]
        logps = trainer.model(input_ids=seen_ids[None]).logits[0, :-1].log_softmax(-1)
        alone = logps.gather(-1, seen_ids[1:, None])[len(seen_ids) - 1 - length :, 0]
        torch.testing.assert_close(ours[i, :length], alone, rtol=1e-4, atol=1e-5)
        made.append((theirs[i, :length] - alone).abs())
    assert torch.cat(made).max() > 1
    if fused:
        (loss, grads, _), (plain, wanted, _) = (loss_and_gradients(trainer, inputs, f) for f in (True, False))
        assert loss == pytest.approx(plain, rel=1e-5)
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_fused_loss_has_trls_value_gradient_and_metrics(loss_type, beta, tmp_path, monkeypatch):
    """Also from the scored rows alone, which is what TRL hands over where it has Triton."""
    skip_luspo(loss_type)
    high = {"epsilon_high": 1.3} if loss_type == "cispo" else {}
    trainer = grpo(
        tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True}, loss_type=loss_type, beta=beta,
        gradient_accumulation_steps=2, delta=None if loss_type in ("cispo", "sapo", "vespo") else 1.6, **high,
    )  # fmt: skip
    for seed, drop in enumerate([(), ("old_per_token_logps",), ("tool_mask",), ("importance_sampling_ratio",)]):
        inputs = {k: v for k, v in micro_batch(trainer, seed, per_token=seed != 2).items() if k not in drop}
        if hasattr(utils, "_use_triton"):
            monkeypatch.setattr(utils, "_use_triton", lambda _, compact=seed % 2 == 1: compact)
        trainer.use_vllm = "importance_sampling_ratio" in inputs
        (fused, ours, our_metrics), (plain, theirs, their_metrics) = (
            loss_and_gradients(trainer, inputs, fused) for fused in (True, False)
        )
        assert plain != 0
        assert fused == pytest.approx(plain, rel=1e-5, abs=1e-6)
        largest = max(g.abs().max() for g in theirs.values())
        assert largest > 0
        for name, grad in theirs.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=2e-6 * float(largest))
        assert our_metrics.keys() == their_metrics.keys()
        assert our_metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6)


OF_MORE_THAN_A_TOKEN = [
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "loss_type": "luspo", "beta": 0.1, "delta": 1.6},
    {"importance_sampling_level": "sequence", "loss_type": "sapo", "beta": 0.1, "use_bias_correction_kl": True},
    {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 1.3},
    {"off_policy_mask_threshold": 0.05, "loss_type": "dapo"},
    {"off_policy_mask_threshold": 0.05, "loss_type": "vespo"},
    {"top_entropy_quantile": 0.4},
    {"top_entropy_quantile": 0.4, "loss_type": "vespo", "entropy_coef": 0.05},
    {"entropy_coef": 0.05, "loss_type": "dapo", "beta": 0.1},
    {"entropy_coef": 0.05, "use_adaptive_entropy": True, "entropy_target": 9.0, "loss_type": "bnpo"},
    {"loss_type": "cispo", "epsilon_high": 0.3},
    {"delta": 1.1, "beta": 0.1, "use_bias_correction_kl": True},
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("options", OF_MORE_THAN_A_TOKEN, ids=str)
def test_losses_of_more_than_a_token_have_trls_value_gradient_and_metrics(options, per_token, tmp_path, monkeypatch):
    """TRL makes them, from our log-probs and entropies; with vLLM's correction and without."""
    skip_luspo(options.get("loss_type"))
    if missing := options.keys() - GRPOConfig.__dataclass_fields__.keys():
        pytest.skip(f"this TRL has no {', '.join(sorted(missing))}")
    trainer = grpo(
        tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True}, gradient_accumulation_steps=2,
        **{"beta": 0.0, "loss_type": "grpo", **options},
    )  # fmt: skip
    inputs = micro_batch(trainer, 1, per_token=per_token)
    trainer.use_vllm = per_token
    if "off_policy_mask_threshold" in options:
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.1
        inputs["sampling_per_token_logps"][0, 1] = float("nan")
    if not per_token:
        inputs.pop("importance_sampling_ratio")
    scored, apply = [], LogProbs.apply
    monkeypatch.setattr(LogProbs, "apply", lambda self, *given: scored.append(1) or apply(self, *given))
    results = []
    for fused in (True, False):
        trainer._last_world_entropy, trainer._entropy_window_stats = 1.0, None
        trainer.entropy_coef = options.get("entropy_coef", 0.0)
        results.append(loss_and_gradients(trainer, inputs, fused))
        assert len(scored) == 1
    (fused, ours, our_metrics), (plain, theirs, their_metrics) = results
    assert plain != 0
    assert fused == pytest.approx(plain, rel=1e-5, abs=1e-6)
    largest = max(g.abs().max() for g in theirs.values())
    assert largest > 0
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=2e-6 * float(largest))
    assert our_metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6, nan_ok=True)


def test_what_a_head_makes_in_one_pass_is_not_left_to_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", None)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"):
        options = {"loss_type": loss_type, "epsilon_high": 1.3, "beta": 0.1}
        trainer = grpo(tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True}, **options)
        inputs = micro_batch(trainer)
        inputs["importance_sampling_ratio"] = torch.tensor([1.5, 0.0, 1.0, 0.5, 2.0])[:, None]
        loss, _, _ = loss_and_gradients(trainer, inputs, fused=True)
        assert loss != 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_fused_run_is_trls_run(loss_type, tmp_path, monkeypatch):
    """Two passes over each batch of two micro-batches, so that ratios leave 1, with a reference."""
    options = {
        "loss_type": loss_type, "beta": 0.05, "num_iterations": 2, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "num_generations": 4, "max_steps": 20, "learning_rate": 3e-3,
    }  # fmt: skip
    plain = grpo(tmp_path, **options)
    a = history(plain)
    fused = grpo(tmp_path, PrefixGRPOTrainer, extra={"advantage": "grpo", "fused_loss": True}, **options)
    # old and reference log-probs are ours as well
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    b = history(fused)
    assert any(log.get("loss") for log in a)
    assert any(log.get("clip_ratio/region_mean") for log in a)
    assert_same_history(a, b, rel=2e-3, abs=2e-5)
    torch.testing.assert_close(weights(plain), weights(fused), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("extra", [{}, {"fused_loss": True}], ids=["log-probs", "loss"])
def test_under_mixed_precision_the_first_loss_is_near_trls(extra, tmp_path):
    """TRL's default: bf16 autocast over float32 weights."""
    options = {"bf16": True, "num_iterations": 2, "beta": 0.05, "max_steps": 4, "loss_type": "grpo"}
    plain = history(grpo(tmp_path, **options))
    with patch_trl():
        ours = history(grpo(tmp_path, PrefixGRPOTrainer, extra={"advantage": "grpo", **extra}, **options))
    for name in ("loss", "entropy", "grad_norm"):
        assert ours[1][name] == pytest.approx(plain[1][name], rel=0.03, abs=2e-3), name


def test_evaluation_goes_through_the_fused_loss_too(tmp_path):
    logs = []
    for cls, extra in ((GRPOTrainer, {}), (PrefixGRPOTrainer, {"advantage": "grpo", "fused_loss": True})):
        trainer = grpo(tmp_path, cls, extra=extra, per_device_eval_batch_size=4, loss_type="dapo")
        logs.append(trainer.evaluate(trainer.train_dataset))
    assert logs[0]["eval_loss"] != 0
    for name in ("eval_loss", "eval_reward", "eval_entropy"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("compact", [False, True])
def test_a_micro_batch_without_a_token_is_a_differentiable_zero(compact, tmp_path, monkeypatch):
    """As where all responses were cut off, with mask_truncated_completions: a process must not hang."""
    trainer = grpo(tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True}, beta=0.1)
    monkeypatch.setattr(utils, "_use_triton", lambda _: compact)
    inputs = micro_batch(trainer)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, grads, _ = loss_and_gradients(trainer, inputs, fused=True)
    assert loss == 0
    assert not any(g.any() for g in grads.values())


def test_the_kernels_make_the_same_loss_in_the_interpreter(tmp_path):
    trainer = grpo(tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True}, beta=0.1, loss_type="grpo")
    results = []
    for backend in ("torch", "triton"):
        trainer.backend = backend
        results.append(loss_and_gradients(trainer, micro_batch(trainer), fused=True))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-5)


def test_learning_statistics_leave_the_loss_as_it_is(tmp_path):
    trainer = grpo(tmp_path, PrefixGRPOTrainer, extra={"fused_loss": True, "stats": "learning"}, delta=1.6)
    inputs = micro_batch(trainer)
    inputs.pop("importance_sampling_ratio")
    (fused, ours, metrics), (plain, theirs, _) = (loss_and_gradients(trainer, inputs, f) for f in (True, False))
    assert fused == pytest.approx(plain, rel=1e-5)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)
    assert metrics["entropy"] > 0


# ---- credit ------------------------------------------------------------------------------------------------


class SecondStep(Detector):
    """Finds the error in the second step, where there is one."""

    def find(self, problem, steps, answer):
        seen.append((problem, list(steps), answer))
        return FirstError(1 if len(steps) > 1 else None, "the second", 1.0)


seen: list = []
# what the policy "says": right, wrong in its second line, wrong in one line, cut off
SAID = ["12\n3a<eos>", "123\n4b<eos>", "b<eos>", "12\n3b"]


def say(trainer, said=SAID):
    """Lets the trainer's model answer every group with these texts."""
    ids = [trainer.processing_class(text)["input_ids"] for text in said]

    def answers(prompts, *_, **__):
        first = trainer.accelerator.process_index * len(prompts)
        return [ids[(first + i) % len(ids)] for i in range(len(prompts))], None

    trainer._generate_single_turn = answers


def right(completions, **_):
    return [float("a" in text) for text in completions]


def spied_batches(trainer, monkeypatch):
    batches = []
    compute = GRPOTrainer._compute_loss

    def spy(self, model, inputs):
        batches.append(inputs)
        return compute(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", spy)
    return batches


def advantages_by_text(trainer, batch):
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    return dict(zip(texts, batch["advantages"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # averages over the tokens: 1, 0.5 * 4 / 7, 0, 0 -> mean 9 / 28
        ("vppo", {"right": [1 - 9 / 28] * 6, "second": [0.5 - 9 / 28] * 4 + [-9 / 28] * 3, "cut": [-9 / 28] * 5}),
        # mu = 1 / 4: 0.75 / sigma or -0.25 / sigma, sigma = 0.433; less the mean over 20 tokens
        ("cliff", None),
        # TRL's own: (r - 1 / 4) / (0.5 + 1e-4)
        (
            "neutral",
            {"right": [0.75 / 0.5001] * 6, "second": [0] * 4 + [-0.25 / 0.5001] * 3, "cut": [-0.25 / 0.5001] * 5},
        ),
    ],
)
def test_every_token_gets_its_advantage(advantage, expected, tmp_path, monkeypatch):
    extra = {"detector": SecondStep(), "segmenter": "lines", "advantage": advantage, "shorten": 0}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, max_steps=1)
    say(trainer)
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    if expected is None:
        sigma = (0.25 * 0.75) ** 0.5
        good, bad = 0.75 / sigma, -0.25 / sigma
        mean = (6 * good + (3 + 2 + 5) * bad) / 20
        expected = {"right": [good - mean] * 6, "second": [-mean] * 4 + [bad - mean] * 3, "cut": [bad - mean] * 5}
    (batch,) = batches
    assert batch["advantages"].shape == batch["completion_ids"].shape == (4, 7)
    rows = advantages_by_text(trainer, batch)
    for name, text in (("right", "12\n3a"), ("second", "123\n4b"), ("cut", "12\n3b")):
        want = expected[name]
        assert rows[text] == pytest.approx(want + [0.0] * (7 - len(want)), abs=1e-5), name
    # only the wrong responses that ended are searched, each with its question and its answer
    questions = dict(zip(TEXTS, ["3", "4", "4", "10"], strict=True))
    assert [steps for _, steps, _ in seen] == [["123\n", "4b"], ["b"]]
    assert all(questions[problem] == answer for problem, _, answer in seen)
    assert any(log.get("first_error/found") == pytest.approx(1 / 3) for log in trainer.state.log_history)


def test_right_answers_with_a_wrong_step_may_be_worth_less(tmp_path, monkeypatch):
    """The right one's second line starts at its fourth token of six: worth 1, then 0.25, on average (3 + 0.75) / 6."""
    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0, "flawed": 0.25}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, max_steps=1)
    say(trainer)
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    assert [steps for _, steps, _ in seen] == [["12\n", "3a"], ["123\n", "4b"], ["b"]]
    mean = (3.75 / 6 + 2 / 7) / 4
    rows = advantages_by_text(trainer, batches[0])
    assert rows["12\n3a"] == pytest.approx([1 - mean] * 3 + [0.25 - mean] * 3 + [0], abs=1e-6)
    assert rows["123\n4b"] == pytest.approx([0.5 - mean] * 4 + [-mean] * 3, abs=1e-6)
    logged = [log for log in trainer.state.log_history if "first_error/found" in log]
    assert [log["first_error/flawed"] for log in logged] == [1.0]
    assert [log["first_error/found"] for log in logged] == [pytest.approx(1 / 3)]


# what a policy and its tools say by turns: right in its second turn, wrong there, wrong in its only one, cut off
TURNS = [[("12", 1), ("30", 0), ("4a<eos>", 1)], [("12", 1), ("3", 0), ("4b<eos>", 1)], [("b<eos>", 1)], [("12", 1)]]


def played(prompts, trainer):
    """A `rollout_func`: each group gets these transcripts, with the mask of its environment."""
    rows = [
        [(token, own) for text, own in turns for token in trainer.processing_class(text)["input_ids"]]
        for turns in (TURNS[i % len(TURNS)] for i in range(len(prompts)))
    ]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[token for token, _ in row] for row in rows],
        "env_mask": [[own for _, own in row] for row in rows],
        "logprobs": None,
    }


def test_credit_ends_at_the_first_wrong_turn(tmp_path, monkeypatch):
    """The wrong one's second turn starts at its third own token, behind what its tool wrote. Averages over the tokens:
    1, 0.5 * 2 / 5, 0, 0, their mean 0.3."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    extra = {"detector": SecondStep(), "segmenter": "turns", "shorten": 0, "rollout_func": played}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, max_steps=1)
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    assert [steps for _, steps, _ in seen] == [["123", "4b"], ["b"]]
    rows = advantages_by_text(trainer, batches[0])
    assert rows["12304a"] == pytest.approx([0.7, 0.7, 0, 0, 0.7, 0.7, 0.7], abs=1e-6)
    assert rows["1234b"] == pytest.approx([0.2, 0.2, 0, -0.3, -0.3, -0.3, 0], abs=1e-6)
    assert rows["12"] == pytest.approx([-0.3, -0.3, *[0] * 5], abs=1e-6)


def double(x: int) -> int:
    """Twice a number.

    Args:
        x: The number.
    """
    return 2 * x


def talker(tmp_path, cls, funcs, extra, **options):
    """A tiny model with Qwen3's chat template, which TRL knows the tools of, a token a character but the marks."""
    marks = ["<|im_end|>", "<pad>", "<|im_start|>", "<unk>"]
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    inner = Tokenizer(models.WordLevel({x: i for i, x in enumerate([*marks, *letters])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=marks[0], pad_token=marks[1], unk_token=marks[3], padding_side="left",
        additional_special_tokens=[marks[2]],
    )  # fmt: skip
    templates = pytest.importorskip("trl.chat_template_utils")
    if not hasattr(templates, "qwen3_chat_template"):
        pytest.skip("a TRL without this template")
    tok.chat_template = templates.qwen3_chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, pad_token_id=1, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    asked = [[{"role": "user", "content": "twice 2, and 3?"}]] * 8
    made = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 400, "max_steps": 1}
    return cls(
        model=LlamaForCausalLM(config), reward_funcs=funcs, args=GRPOConfig(**settings(tmp_path, **made, **options)),
        train_dataset=Dataset.from_dict({"prompt": asked}), processing_class=tok, **extra,
    )  # fmt: skip


def test_credit_ends_at_the_first_wrong_turn_of_a_run_with_tools(tmp_path, monkeypatch):
    """TRL calls the tool and asks again; three turns, the last two of which are judged in one response."""

    def call(x):
        return f'<tool_call>\n{{"name": "double", "arguments": {{"x": {x}}}}}\n</tool_call><|im_end|>'

    def told(completions, **_):
        return [float("a" in completion[-1]["content"]) for completion in completions]

    class LastTurn(SecondStep):
        def find(self, problem, steps, answer):
            seen.append((problem, list(steps), answer))
            return FirstError(len(steps) - 1, "the last", 1.0)

    extra = {"detector": LastTurn(), "segmenter": "turns", "shorten": 0, "tools": [double]}
    trainer = talker(tmp_path, PrefixGRPOTrainer, told, extra)
    rounds = [[call(2), call(2), call(2), "0<|im_end|>"], ["6a<|im_end|>", call(9), "6b<|im_end|>"], ["18b<|im_end|>"]]

    def answers(prompt_ids, *_, **__):
        texts = rounds.pop(0)
        assert len(prompt_ids) == len(texts)
        return [trainer.processing_class(text)["input_ids"] for text in texts], None

    trainer._generate_single_turn = answers
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    assert not rounds
    by_length = sorted((steps for _, steps, _ in seen), key=len)
    assert [len(steps) for steps in by_length] == [1, 2, 3]
    assert [steps[-1] for steps in by_length] == ["0", "6b", "18b"]
    assert all(problem == "twice 2, and 3?" for problem, _, _ in seen)
    assert '{"x": 9}' in by_length[2][1]
    assert "18" in by_length[2][1].split("tool_response")[1]  # what the tool answered stands behind its call
    batch = batches[0]
    mask = batch["completion_mask"] * batch["tool_mask"]
    counts = turn_counts(mask).tolist()
    assert sorted(counts) == [1, 2, 2, 3]
    given, number = batch["advantages"], turns(mask)
    row = counts.index(3)
    kept, blamed = (given[row][(number[row] < 2) & (mask[row] == 1)].unique(), given[row][number[row] == 2].unique())
    assert len(kept) == len(blamed) == 1
    assert kept - blamed == pytest.approx(0.5, abs=1e-6)
    assert not given[mask == 0].any()


def test_without_tools_a_response_is_one_turn(tmp_path, monkeypatch):
    extra = {"detector": SecondStep(), "segmenter": "turns", "shorten": 0}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, max_steps=1)
    say(trainer)
    seen.clear()
    trainer.train()
    assert [steps for _, steps, _ in seen] == [["123\n4b"], ["b"]]


class Unsure(SecondStep):
    """The same, with little confidence."""

    def find(self, problem, steps, answer):
        return super().find(problem, steps, answer)._replace(confidence=0.4)


@pytest.mark.parametrize(("threshold", "prefix"), [(0.4, 4), (0.41, 0)])
def test_a_find_below_the_threshold_splits_no_credit(threshold, prefix, tmp_path, monkeypatch):
    """The averages over tokens are 1, alpha * prefix / 7, 0 and 0."""
    extra = {"detector": Unsure(), "segmenter": "lines", "shorten": 0, "threshold": threshold}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, max_steps=1)
    say(trainer)
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    mean = (1 + 0.5 * prefix / 7) / 4
    want = [0.5 - mean] * prefix + [-mean] * (7 - prefix)
    assert advantages_by_text(trainer, batches[0])["123\n4b"] == pytest.approx(want, abs=1e-5)
    found = pytest.approx((prefix > 0) / 3)
    assert any(log.get("first_error/found") == found for log in trainer.state.log_history)


def test_a_threshold_is_a_number_from_0_to_1(tmp_path):
    with pytest.raises(ValueError, match=r"threshold: got 1\.5, expected a finite number between 0 and 1"):
        grpo(tmp_path, PrefixGRPOTrainer, right, {"threshold": 1.5})


def test_a_vppo_run_learns_through_the_fused_loss_as_through_trls(tmp_path):
    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0}
    runs = []
    for fused in (False, True):
        trainer = grpo(tmp_path, PrefixGRPOTrainer, right, {**extra, "fused_loss": fused}, max_steps=10)
        say(trainer)
        start = weights(trainer)
        runs.append((history(trainer), weights(trainer)))
        assert not torch.equal(start, runs[-1][1])
    assert_same_history(runs[0][0], runs[1][0], rel=5e-3, abs=1e-4)


def test_the_first_error_is_counted_in_tokens_of_the_model():
    """Tokens 1 and 2 of each response come from a tool; the fourth ends in one, the last has no token at all."""
    mask = torch.tensor([[1, 0, 0, 1, 1]] * 3 + [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert _scored_index(torch.tensor([4, 2, -1, 3, 2]), mask).tolist() == [2, 1, -1, 0, -1]


@pytest.mark.parametrize(
    "prompt",
    [
        "1 + 1?",
        [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1 + 1?"}]}],
        [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Well,"}],
    ],
)
def test_the_question_is_what_the_user_said_last(prompt):
    assert _question(prompt) == "1 + 1?"


def test_evaluation_finds_first_errors_in_groups_of_its_own_size(tmp_path):
    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0}
    options = {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, right, extra, **options)
    say(trainer)
    trainer.model.eval()
    batch = trainer._prepare_inputs([trainer.train_dataset[i // 2] for i in range(4)])
    # averages 1 and 2 / 7 in one group, 0 and 0 in the other
    want = {
        "12\n3a": [5 / 14] * 6 + [0],
        "123\n4b": [0.5 - 9 / 14] * 4 + [-9 / 14] * 3,
        "b": [0] * 7,
        "12\n3b": [0] * 7,
    }
    assert advantages_by_text(trainer, batch) == {text: pytest.approx(row) for text, row in want.items()}


@pytest.mark.parametrize("advantage", ["vppo", "cliff", "neutral"])
def test_a_verifier_that_abstains_leaves_a_response_what_trl_gives_it(advantage, tmp_path, monkeypatch):
    """`checked` has no verdict on "b", which earns TRL's advantage by its form; the others' baseline is over three."""

    def checked(completions, **_):
        return [None if text == "b" else float("a" in text) for text in completions]

    def form(completions, **_):
        return [2.0 * (text == "b") for text in completions]

    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0, "advantage": advantage, "correct": "checked"}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, [checked, form], extra, max_steps=1, scale_rewards="none")
    say(trainer)
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    rows = advantages_by_text(trainer, batches[0])
    # TRL's rewards are 1, 0, 2, 0, their mean 0.75
    assert rows["b"] == pytest.approx([1.25] * 2 + [0] * 5)
    assert [steps for _, steps, _ in seen] == [["123\n", "4b"]]
    sigma = (2 / 9) ** 0.5  # mu = 1 / 3
    mean = (6 * 2 / 3 - 8 / 3) / sigma / 18  # over 6 right tokens, and 3 + 5 wrong ones behind 4 good ones
    right, good, bad = {
        "vppo": (1 - 3 / 7, 0.5 - 3 / 7, -3 / 7),  # averages 1, 0.5 * 4 / 7, 0
        "cliff": (2 / 3 / sigma - mean, -mean, -1 / 3 / sigma - mean),
        "neutral": (0.25, 0.0, -0.75),
    }[advantage]
    assert rows["12\n3a"] == pytest.approx([right] * 6 + [0], abs=1e-6)
    assert rows["123\n4b"] == pytest.approx([good] * 4 + [bad] * 3, abs=1e-6)
    assert rows["12\n3b"] == pytest.approx([bad] * 5 + [0] * 2, abs=1e-6)


def test_a_response_without_any_reward_teaches_nothing(tmp_path, monkeypatch):
    def unsure(completions, **_):
        return [None if text == "b" else float("a" in text) for text in completions]

    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, unsure, extra, max_steps=1)
    say(trainer)
    seen.clear()
    batches = spied_batches(trainer, monkeypatch)
    trainer.train()
    rows = advantages_by_text(trainer, batches[0])
    assert not any(rows["b"])
    assert [steps for _, steps, _ in seen] == [["123\n", "4b"]]
    # the baseline is over the other three: 1, 2 / 7, 0
    assert rows["12\n3a"][0] == pytest.approx(1 - 3 / 7)


@pytest.mark.parametrize(
    ("correct", "expected"),
    [
        (0.7, [True, False, True]),
        (1.5, [False] * 3),
        ("right", [True, False, False]),
        (lambda r: r[:, 1] > 0, [False, True, True]),
        ("form", [None, False, False]),
        (lambda r: r[:, 1] + r[:, 0], [None, True, True]),
    ],
)
def test_rewards_become_right_or_wrong_as_asked(correct, expected, tmp_path):
    def form(completions, **_):
        return [0.0] * len(completions)

    extra = {"correct": correct}
    trainer = grpo(tmp_path, PrefixGRPOTrainer, [right, form], extra, reward_weights=[1.0, 2.0])
    form_gave = torch.nan if None in expected else 0.0
    rewards = torch.tensor([[1.0, form_gave], [0.0, 0.2], [0.0, 0.5], [torch.nan, torch.nan]])
    said = [None if math.isnan(x) else bool(x) for x in trainer._verdicts(rewards).tolist()]
    assert said == [*expected, None]


def test_which_reward_says_right_has_to_be_said(tmp_path):
    with pytest.raises(ValueError, match=r"^correct: got None with 2 reward functions, .*right, vowels"):
        grpo(tmp_path, PrefixGRPOTrainer, [right, vowels])
    with pytest.raises(ValueError, match=r"^correct: got 'wrong', expected the name of a reward function: right"):
        grpo(tmp_path, PrefixGRPOTrainer, right, {"correct": "wrong"})


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"segmenter": "words"}, "segmenter"),
        ({"advantage": "gae"}, "advantage"),
        ({"detector": None}, "detector"),
        ({"alpha": 2}, "alpha"),
        ({"shorten": -1}, "shorten"),
        ({"flawed": 2}, "flawed"),
        ({"flawed": 0.5, "advantage": "cliff"}, "flawed"),
    ],
)
def test_wrong_arguments_are_named(extra, name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        grpo(tmp_path, PrefixGRPOTrainer, right, extra)


def test_a_scale_of_the_batch_is_refused_where_it_would_not_count(tmp_path):
    with pytest.raises(ValueError, match=r'^scale_rewards: got "batch", expected'):
        grpo(tmp_path, PrefixGRPOTrainer, right, {"detector": "maths"}, scale_rewards="batch")
    grpo(tmp_path, PrefixGRPOTrainer, right, {"detector": "maths", "advantage": "neutral"}, scale_rewards="batch")


# ---- two processes -----------------------------------------------------------------------------------------


def two_processes(out):
    """On each of two processes: TRL's run, the fused one, and the vppo advantages of a group that lies on both."""
    options = {"per_device_train_batch_size": 2, "num_iterations": 2, "beta": 0.05, "max_steps": 4}
    rank = int(os.environ["RANK"])
    made = {"plain": history(grpo(out / str(rank), **options))}
    extra = {"advantage": "grpo", "fused_loss": True}
    fused = grpo(out / str(rank), PrefixGRPOTrainer, extra=extra, **options)
    made["fused"], made["weights"] = history(fused), weights(fused).tolist()
    extra = {"detector": SecondStep(), "segmenter": "lines", "shorten": 0}
    trainer = grpo(out / str(rank), PrefixGRPOTrainer, right, extra, per_device_train_batch_size=2, max_steps=1)
    say(trainer)
    with pytest.MonkeyPatch.context() as patch:
        batches = spied_batches(trainer, patch)
        trainer.train()
    made["advantages"] = advantages_by_text(trainer, batches[0])
    (out / f"{rank}.json").write_text(json.dumps(made))


@pytest.mark.slow
def test_two_processes_make_one_run_and_share_a_group(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    assert_same_history(one["plain"], one["fused"], rel=2e-3, abs=2e-5)
    advantages = one["advantages"] | two["advantages"]
    assert len(one["advantages"]) == len(two["advantages"]) == 2
    assert advantages["12\n3a"][0] == pytest.approx(1 - 9 / 28)
    assert advantages["123\n4b"][:7] == pytest.approx([0.5 - 9 / 28] * 4 + [-9 / 28] * 3)
    assert advantages["b"][0] == advantages["12\n3b"][0] == pytest.approx(-9 / 28)


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
