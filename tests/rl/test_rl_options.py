"""Written problems through a byte tokenizer and a chat template: adapters, dtypes, checkpointing, trackers, pages."""

import copy
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixloss.io import checkpoint
from prefixloss.rl import UsageError, start, task, trackers, train
from prefixloss.rl.config import Config
from prefixloss.rl.policy import Policy, load_policy
from prefixloss.rl.report import Report
from prefixloss.rl.run import Adapters
from prefixloss.steps import INSTRUCTION

# as GSM8K writes them: a solution in lines, the calculations in brackets, the answer last
PROBLEMS = [
    (
        "Mia bakes 3 trays of 8 rolls and eats 2. How many are left?",
        "3*8 = <<3*8=24>>24\n24-2 = <<24-2=22>>22\n#### 22",
    ),
    ("A bus has 40 seats, 15 of them taken. How many are free?", "40-15 = <<40-15=25>>25\n#### 25"),
    ("Ben earns $1,200 a month. How much is that in a year?", "1200*12 = $<<1200*12=14400>>14,400\n#### 14,400"),
    ("Half of 90 sheep are shorn. How many are not?", "90/2 = <<90/2=45>>45\n#### 45"),
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUN = {
    "updates": 2, "prompts": 2, "group": 2, "max_tokens": 12, "epochs": 2, "minibatches": 1, "micro_prompts": 1,
    "eval_every": 2, "eval_problems": 1, "eval_samples": 2, "k": 1, "save_every": 1, "lr": 1e-2, "lr_warmup": 0,
    "detector": "maths", "shorten": "prompt", "kl_coef": 0.1, "advantage": "vppo",
}  # fmt: skip


def byte_model(directory: Path) -> Path:
    """A Llama with random weights that reads and writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<eos>", "<|user|>", "<|assistant|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1024, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(byte_model(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder, as a data set's name stands for."""
    folder = tmp_path_factory.mktemp("sums")
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in PROBLEMS]
    (folder / "train.jsonl").write_text("".join(lines))
    return str(folder)


def quiet():
    return Report(Console(file=open(os.devnull, "w")))


def trained(directory, model, data, **changes):
    return train.train(Config(**{**RUN, "model": model, "data": data, **changes}), directory, quiet())


# ---- problems


def test_a_folder_holds_out_its_test_file_or_an_eighth(data, tmp_path):
    training, held_out = task.load_split(Path(data), 9)
    assert (len(training), len(held_out)) == (3, 1)
    assert {p.answer for p in (*training, *held_out)} == {"22", "25", "14,400", "45"}
    lines = (Path(data) / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "test.jsonl").write_text("".join(lines[:2]))
    training, held_out = task.load_split(tmp_path, 9)
    assert [p.answer for p in held_out] == ["22", "25"]
    assert [p.answer for p in training] == ["14,400", "45"]  # none of those held out
    assert len(task.load_split(tmp_path, 1)[1]) == 1


def test_a_folder_without_problems_is_refused(tmp_path, model):
    with pytest.raises(UsageError, match=r"--data: .* has 0 different questions, expected at least 2"):
        start.open_problems(Config(model=model, data=str(tmp_path)))
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(UsageError, match=r"--data: .* has 0 problems to train on and 1 held out"):
        start.open_problems(Config(model=model, data=str(tmp_path)))


# ---- whole runs


def test_a_run_on_written_problems_holds_together(model, data, tmp_path, monkeypatch):
    """The template, its tokens, the maths detector, answers with commas: the model is made to say what people would."""
    answers = dict(PROBLEMS)
    said = []

    def written(policy, questions, _):
        for number, question in enumerate(questions):
            right = answers[question].replace("<<", "[").replace(">>", "]").split("\n####")
            steps = right[0].replace("[", "(").replace("]", ")")
            steps = "\n".join(f"Step {i}: {line.split('(')[0].strip()} {line.split(')')[1].strip(' $')}" for i, line in
                              enumerate(steps.split("\n"), 1))  # fmt: skip
            end = right[1].strip() if number % 2 else "7"
            wrong = steps if number % 2 else steps.rsplit(" ", 1)[0] + " 7"
            said.append(f"{wrong}\nAnswer: {end}")
        return policy.written(questions, said[-len(questions) :])

    monkeypatch.setattr(Policy, "sample", written)
    history = trained(tmp_path, model, data)
    assert [m["reward"] for m in history[1:]] == [0.5, 0.5]
    assert history[-1]["kl"] > 0
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert {line["correct"] for line in lines} == {True, False}
    wrong = [line for line in lines if not line["correct"]]
    # the last calculation of each was changed; the answer stands in the same step
    assert all(line["first_error"] == len(line["steps"]) - 1 for line in wrong)
    assert all("is false" in line["reason"] for line in wrong)


def test_prompts_are_the_templates_own(model):
    policy = load_policy(model)
    prompt = policy.prompt("How many?")
    assert prompt.startswith("<|user|>")
    assert prompt.endswith("Problem: How many?\n\n<|assistant|>")
    ids, seen = policy.encode(["How many?"])
    assert policy.tokenizer.decode(ids[0][seen[0].bool()]) == prompt
    assert ids[0][0] == policy.tokenizer.convert_tokens_to_ids("<|user|>")


def test_a_chat_template_can_be_needed_or_left_off(model, tmp_path):
    def prompt(chat, name=model):
        return start.open_policy(Config(model=name, chat=chat), "cpu").prompt("How many?")

    assert prompt(True) == prompt(None)
    assert prompt(True).startswith("<|user|>")
    plain = start.open_policy(Config(model=model, chat=False), "cpu")
    assert plain.prompt("How many?") == INSTRUCTION.format(question="How many?")
    plain.save(tmp_path)
    # who loads it asks as it was trained
    assert prompt(None, str(tmp_path)) == plain.prompt("How many?")
    with pytest.raises(UsageError, match=r"--chat: the tokenizer of '.*' has no chat template"):
        prompt(True, str(tmp_path))


def test_left_off_it_is_left_off_where_the_policy_goes_on_from_prefixes(model):
    config = Config(model=model, chat=False, detector="rollouts")
    policy = start.open_policy(config, "cpu")
    sampler = train.own_rollouts(config, policy).sampler
    assert (sampler.prompt("How many?"), sampler.special) == (policy.prompt("How many?"), True)


def test_a_chat_template_that_fails_is_named_before_any_work(model, tmp_path):
    policy = load_policy(model)
    policy.tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    policy.save(tmp_path)
    for chat in (None, True):
        with pytest.raises(UsageError, match=r"--chat: the chat template of .* fails, .*a system message first"):
            start.open_policy(Config(model=str(tmp_path), chat=chat), "cpu")
    assert start.open_policy(Config(model=str(tmp_path), chat=False), "cpu").prompt("q")


def test_each_evaluation_leaves_a_page_of_samples_with_their_credit(model, data, tmp_path):
    trained(tmp_path, model, data, updates=3)
    assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == ["update-2.html", "update-3.html"]
    page = (tmp_path / "pages" / "update-3.html").read_text()
    assert page.count("<details") == 4  # two groups of two
    assert "advantage" in page


# ---- adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_kept_and_merged(model, data, tmp_path, dtype):
    pytest.importorskip("peft")
    trained(tmp_path, model, data, lora=2, dtype=dtype, updates=3, save_every=3, advantage="grpo")
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert set(saved) >= {"model", "optimizer"}
    assert "reference" not in saved
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in saved["model"].items())
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    kept = {n for n in before if torch.equal(before[n].to(getattr(torch, dtype)).float(), after[n])}
    assert {n for n in before if "proj" not in n} <= kept


def test_frozen_weights_are_rounded_and_rotary_frequencies_are_not(model):
    pytest.importorskip("peft")
    plain = dict(start.open_policy(Config(model=model), "cpu").model.named_buffers())
    policy = start.open_policy(Config(model=model, lora=2, dtype="bfloat16"), "cpu").model
    assert any(p.dtype == torch.bfloat16 for p in policy.parameters())
    frequencies = [value for name, value in plain.items() if "inv_freq" in name]
    assert frequencies
    for name, value in policy.named_buffers():
        if "inv_freq" in name:
            assert any(torch.equal(value, x) for x in frequencies)


def test_a_step_moves_adapters_only_and_the_reference_shares_the_rest(model):
    pytest.importorskip("peft")
    policy = start.open_policy(Config(model=model, lora=2), "cpu")
    reference = start.frozen(policy)
    own, theirs = dict(policy.model.named_parameters()), dict(reference.model.named_parameters())
    for name, p in own.items():
        assert p.requires_grad == ("lora_" in name)
        assert (p is theirs[name]) == (not p.requires_grad)
        assert not theirs[name].requires_grad
    sampled = policy.written(["a"], ["bcd"])
    for name, p in own.items():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    assert not torch.allclose(policy.hidden(sampled), reference.hidden(sampled), atol=1e-3)
    torch.testing.assert_close(reference.hidden(sampled), load_policy(model).hidden(sampled))


def test_adapters_resume_to_the_same_bits(model, data, tmp_path):
    pytest.importorskip("peft")
    given = {"lora": 2, "updates": 4, "save_every": 2, "eval_every": 4}
    trained(tmp_path / "whole", model, data, **given)
    state = {}
    real = checkpoint.save

    def stop_after_two(path, saved):
        real(path, saved)
        if saved["state"]["update"] == 2:
            state["at"] = 2
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", model, data, **given)
    assert state == {"at": 2}
    trained(tmp_path / "cut", model, data, **given)
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_adapters_of_a_checkpoint_are_put_back(model):
    pytest.importorskip("peft")
    policy = start.open_policy(Config(model=model, lora=2), "cpu")
    adapters = Adapters(policy.model)
    saved = {name: torch.full_like(p, 0.5) for name, p in adapters.state_dict().items()}
    assert saved
    adapters.load_state_dict(saved)
    assert all((p == 0.5).all() for p in policy.model.parameters() if p.requires_grad)
    with pytest.raises(KeyError):
        adapters.load_state_dict({})


# ---- dtype and memory


def test_bfloat16_products_leave_float32_weights_and_gradients(model):
    sampled_by = load_policy(model)
    policy = start.open_policy(Config(model=model, dtype="bfloat16"), "cpu")
    sampled = policy.written(["What is 2+3?"], ["Step 1: 2+3=5"])
    made = set()
    policy.decoder.layers[0].mlp.down_proj.register_forward_hook(lambda *given: made.add(given[-1].dtype))
    hidden = policy.hidden(sampled)
    policy.sample(["What is 2+3?"], 2)
    assert made == {torch.bfloat16}
    assert hidden.dtype == policy.weight.dtype == torch.bfloat16
    (hidden.float().sum() + policy.weight.float().sum()).backward()
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.model.parameters())
    exact = sampled_by.hidden(sampled)
    off = (hidden.float() - exact).abs().max() / exact.abs().max()
    assert 0 < off < 0.1  # products of 8 bits, through two layers


def test_layers_that_are_computed_again_give_the_same_gradients_and_keep_less(model):
    found, kept = [], []
    for again in (False, True):
        policy = start.open_policy(Config(model=model, gradient_checkpointing=again), "cpu")
        sampled = policy.written(["What is 2+3?"], ["Step 1: 2+3=5"])
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.numel()) or x, lambda x: x):
            loss = policy.hidden(sampled).pow(2).sum()
        loss.backward()
        found.append([p.grad.clone() for p in policy.decoder.parameters()])
        kept.append(sum(held))
        assert not policy.model.training
        copied = copy.deepcopy(policy)  # a frozen copy runs its own layers
        assert copied.decoder.layers[0].forward is not policy.decoder.layers[0].forward
    assert kept[1] < 0.5 * kept[0]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copy_with_layers_computed_again_runs_its_own_weights(model):
    policy = start.open_policy(Config(model=model, gradient_checkpointing=True), "cpu")
    reference = start.frozen(policy)
    sampled = policy.written(["a"], ["b"])
    before = reference.hidden(sampled)
    with torch.no_grad():
        for p in policy.decoder.layers.parameters():
            p.zero_()
    torch.testing.assert_close(reference.hidden(sampled), before)
    assert not torch.allclose(policy.hidden(sampled), before, atol=1e-3)


# ---- trackers


def test_tensorboard_has_every_figure_once_after_a_resumed_run(model, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    run = tmp_path / "run"
    trained(run, model, data, log_to="tensorboard")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "updates": 3}))
    history = trained(run, model, data, log_to="tensorboard", updates=3)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("reward", "kl", "pass@1"):
        expected = [(m["update"], m[name]) for m in history if name in m]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(v)) for s, v in expected]


def test_tensorboard_forgets_updates_that_are_made_again(tmp_path):
    """A run that was killed resumes from a checkpoint before its last figures."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    for done, updates in ((0, (1, 2, 3)), (1, (2,))):
        with trackers.opened("tensorboard", tmp_path, {}, done) as log:
            for update in updates:
                log({"update": update, "reward": update + 10.0 * done})
        for number, file in enumerate(sorted((tmp_path / "tensorboard").iterdir())):
            file.rename(file.with_name(f"events.out.tfevents.{done + number}"))  # both within a second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1.0), (2, 12.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_settings_figures_and_an_end(name, model, data, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType(name)
    fake.__spec__ = types.SimpleNamespace(name=name)
    fake.init = lambda **given: calls.append(("init", given["project"], given["name"], given["config"]["updates"]))
    fake.log = lambda figures, step: calls.append(("log", step, "reward" in figures))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, fake)
    trained(tmp_path / "run", model, data, log_to=name)
    logs = [("log", 0, False), ("log", 1, True), ("log", 2, True)]
    assert calls == [("init", "prefixloss", "run", 2), *logs, ("finish",)]


# ---- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": -1}, "--lora: got -1, expected a whole number of at least 0"),
        ({"lora": 4}, "--lora: got 4, expected --model with it"),
        ({"dtype": "float16"}, "--dtype: got 'float16', expected one of float32, bfloat16"),
        ({"log_to": "mlflow"}, "--log-to: got 'mlflow', expected one of tensorboard, wandb, trackio"),
        ({"gradient_checkpointing": 1}, "--gradient-checkpointing: got 1, expected true or false"),
        ({"lora": True}, "--lora: got True, expected a whole number"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UsageError) as error:
        Config(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("package", "settings", "message"),
    [
        ("peft", {"lora": 4, "model": "m"}, '--lora: got 4, expected peft with it: pip install "prefixloss[lora]"'),
        ("wandb", {"log_to": "wandb"}, "--log-to: got 'wandb', expected that package, which is not installed"),
    ],
)
def test_a_missing_package_is_named_before_any_work(package, settings, message, monkeypatch):
    monkeypatch.setattr("prefixloss.rl.config.find_spec", lambda name: None if name == package else object())
    with pytest.raises(UsageError) as error:
        Config(**settings)
    assert str(error.value).startswith(message)
