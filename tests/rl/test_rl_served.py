"""Responses by a served engine: a model on this machine that loads each new policy, or fails, as it is told."""

import itertools
import json
from collections import deque
from pathlib import Path

import pytest
import torch
from processes import group_of, in_processes
from rich.console import Console
from served_model import KEY, fingerprint, serving
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.io import checkpoint, endpoint
from prefixloss.io.address import Address
from prefixloss.io.endpoint import UnansweredError
from prefixloss.rl import UsageError, train
from prefixloss.rl.completions import Limits, Written, read, request
from prefixloss.rl.config import Config
from prefixloss.rl.engine import Engine, Place
from prefixloss.rl.optimise import Stepper
from prefixloss.rl.policy import add_lora, tiny_policy
from prefixloss.rl.reload import BY_NAME
from prefixloss.rl.report import Report
from prefixloss.rl.team import Team
from prefixloss.steps import decode

SMALL = {
    "updates": 3, "prompts": 2, "group": 4, "max_tokens": 8, "epochs": 1, "minibatches": 2, "eval_every": 2,
    "advantage": "grpo", "eval_problems": 2, "eval_samples": 2, "k": 2, "save_every": 1,
    "hidden_size": 32, "layers": 1, "warm_steps": 0,
    "min_steps": 1, "max_steps": 1, "lr": 1e-2, "lr_warmup": 0, "timeout": 60.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)


def quiet():
    return Report(Console(quiet=True))


def other(seed=7):
    """A model of the same shape as the tiny policy's, with weights of its own."""
    torch.manual_seed(seed)
    return tiny_policy(SMALL["hidden_size"], SMALL["layers"])


@pytest.fixture
def policy():
    return other(1)


@pytest.fixture
def served():
    with serving(other().model) as server:
        yield server


def engine(policy, served, folder, reload="vllm", **place):
    address = Address.of(place.pop("url", served.url))
    there = Place(address.named(10.0), folder, place.pop("seconds", 10.0))
    return Engine(policy, there, BY_NAME[reload], ["2+3=?", "7-4=?"])


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run by a served engine; the server; and, an update each, the policy's weights before it and its responses."""
    seen, real = [], train.update

    def update(config, policy, reference, stepper, sampled, *rest):
        seen.append(
            (fingerprint(policy.model), sampled, train.logps_of(policy, sampled, [torch.arange(len(sampled.mask))]))
        )
        return real(config, policy, reference, stepper, sampled, *rest)

    directory = tmp_path_factory.mktemp("served") / "run"
    with pytest.MonkeyPatch.context() as patch, serving(other().model) as server:
        patch.setenv("NO_PROXY", "*")
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setattr(train, "check", every_second)
        patch.setattr(train, "update", update)
        history = train.train(Config(**SMALL, rollouts=server.url), directory, quiet())
    return directory, server, seen, history


# of the run's requests for samples: those of an evaluation, 2 problems and 2 samples, and an update, 2 prompts and 4
RESPONSES = {
    "at the start": slice(0, 4), "first": slice(4, 12), "second": slice(12, 20), "after two": slice(20, 24),
    "third": slice(24, 32), "at the end": slice(32, 36),
}  # fmt: skip


def every_second(problems, sampled):
    """An untrained policy is never right, and would have nothing to learn from."""
    return [number % 2 == 0 for number in range(len(problems))]


def test_the_weights_that_sample_an_update_are_those_that_the_update_before_has_left(run):
    _, server, seen, _ = run
    assert len(seen) == SMALL["updates"]
    assert len({weights for weights, *_ in seen}) == SMALL["updates"]  # each update has moved them
    by = [of for _, of in server.samples()]
    for number, (weights, *_) in zip(("first", "second", "third"), seen, strict=True):
        assert set(by[RESPONSES[number]]) == {weights}


def test_evaluations_are_by_the_engine_too(run):
    directory, server, seen, history = run
    by = [of for _, of in server.samples()]
    assert len(by) == 3 * 8 + 3 * 4
    assert set(by[RESPONSES["at the start"]]) == {seen[0][0]}
    assert set(by[RESPONSES["after two"]]) == {seen[2][0]}
    assert set(by[RESPONSES["at the end"]]) == {fingerprint(AutoModelForCausalLM.from_pretrained(directory / "policy"))}
    assert [m["update"] for m in history if "pass@1" in m] == [0, 2, 3]


def test_the_engines_log_probs_reach_the_loss_and_a_gap_is_reported(run):
    _, _, seen, history = run
    for _, sampled, old in seen:
        # float32 products of another order: without padding, a response at a time
        torch.testing.assert_close(sampled.logps, old, rtol=1e-4, atol=1e-4)
        assert (sampled.logps[sampled.mask] < 0).any()
        assert (sampled.logps[~sampled.mask] == 0).all()
    texts = [
        decode(other().tokenizer, row[mask].tolist()) for row, mask in zip(sampled.tokens, sampled.mask, strict=True)
    ]
    assert sampled.texts == texts
    assert all(0 < m["sampler_gap"] < 1e-4 for m in history[1:])


def test_one_directory_of_weights_stays(run):
    directory, *_ = run
    (left,) = (directory / "served").iterdir()
    assert left.name.endswith("-3")
    assert (left / "config.json").exists()


def test_the_same_seed_gives_the_same_run_and_a_resumed_one_the_same_bits(run, tmp_path, monkeypatch):
    directory, *_ = run
    real = checkpoint.save

    def stop_after_two(path, saved):
        real(path, saved)
        if saved["state"]["update"] == 2:  # evaluated, so that its weights are loaded twice
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "check", every_second)
    with serving(other(8).model) as server:
        config = Config(**SMALL, rollouts=server.url)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", stop_after_two)
            with pytest.raises(KeyboardInterrupt):
                train.train(config, tmp_path / "run", quiet())
        train.train(config, tmp_path / "run", quiet())
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (directory / name).read_bytes(), name


# ---- what the loss makes of them


def test_a_sampler_that_is_not_the_policy_is_corrected_for(policy):
    """q is capped at 2: log-probs that lie 3 nats below the policy's count as if they lay log 2 below them."""
    sampled = policy.written(["2+3=?"] * 2, ["Answer: 5", "Answer: 6"])
    own = policy.logps(sampled)
    losses = []
    for shift in (None, 0.0, -0.3, -3.0):
        small = {"prompts": 1, "group": 2, "minibatches": 1, "kl_coef": 0.0, "lr": 1e-30, "max_grad_norm": 1e6}
        config = Config(**{**SMALL, **small})
        asked = sampled if shift is None else sampled.with_logps((own + shift) * sampled.mask)
        options = train.loss_config(config, policy, asked)
        assert options.sampler_correction == (None if shift is None else "tis")
        assert options.sampler_bounds == (0.0, 2.0)
        policy.model.zero_grad()
        credit, group_ids = torch.tensor([1.0, -0.5]), torch.zeros(2, dtype=torch.int64)
        sgd = torch.optim.SGD(policy.model.parameters(), lr=0.0)
        stepper = Stepper(config, policy.model, sgd)
        train.update(config, policy, policy, stepper, asked, credit, group_ids)
        losses.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0] * 2.718281828**0.3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[3], losses[0] * 2, rtol=1e-4, atol=1e-6)


# ---- new weights


@pytest.mark.parametrize("reload", ["vllm", "sglang"])
def test_an_engine_has_the_policys_weights_once_it_is_told(policy, served, tmp_path, reload):
    by = engine(policy, served, tmp_path, reload)
    by.load(0)
    assert fingerprint(served.model) == fingerprint(policy.model)
    assert "/reset_prefix_cache" in [path for path, *_ in served.asked] or reload == "sglang"
    with torch.no_grad():
        policy.lm_head.weight[5] += 1.0
    before = len(served.asked)
    by.load(0)  # no new ones
    assert len(served.asked) == before
    by.load(1)
    assert fingerprint(served.model) == fingerprint(policy.model)


def test_adapters_are_loaded_under_a_new_name_each_and_the_old_ones_let_go(policy, served, tmp_path):
    pytest.importorskip("peft")
    served.model.load_state_dict(policy.model.state_dict())
    add_lora(policy, 2)
    by = engine(policy, served, tmp_path, "vllm-lora")
    for update in range(3):
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                if "lora_B" in name:
                    p.add_(0.05 * torch.randn_like(p))
        by.load(update)
        sampled = by.sample(["2+3=?"] * 3, 6)
        torch.testing.assert_close(sampled.logps, policy.logps(sampled), rtol=1e-4, atol=1e-4)
        (name,) = served.adapters
        assert name.endswith(f"-{update}")
        (left,) = tmp_path.iterdir()
        assert {path.name for path in left.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not (left / "model.safetensors").exists()


def test_an_engine_that_did_not_load_the_weights_is_found_out(policy, served, tmp_path):
    by = engine(policy, served, tmp_path)
    by.load(0)
    served.deaf = True
    by.load(1)  # nothing has moved
    with torch.no_grad():
        policy.lm_head.weight.add_(0.01 * torch.randn_like(policy.lm_head.weight))
    with pytest.raises(UnansweredError, match=r"rollouts: the engine answers as before .* it has not loaded"):
        by.load(2)


def test_small_steps_that_an_engine_does_not_follow_add_up(policy, served, tmp_path):
    by = engine(policy, served, tmp_path)
    by.load(0)
    served.deaf = True
    towards = 4e-5 * torch.randn_like(policy.lm_head.weight)

    def step(update):
        with torch.no_grad():
            policy.lm_head.weight += towards
        by.load(update)

    step(1)  # less than shows
    with pytest.raises(UnansweredError, match="it has not loaded the weights"):
        deque(map(step, range(2, 20)), maxlen=0)


def test_another_model_is_found_out_before_anything_is_learned_from_it(policy, served, tmp_path):
    with torch.no_grad():
        for p in served.model.parameters():
            p.mul_(3)
    served.deaf = True
    with pytest.raises(UnansweredError, match=r"rollouts: the engine's log-probs are .* from the policy's on average"):
        engine(policy, served, tmp_path).load(0)


@pytest.mark.parametrize(
    ("reload", "path", "content", "message"),
    [
        ("vllm", "/collective_rpc", {}, '/collective_rpc: no "results", one a worker'),
        ("vllm", "/collective_rpc", {"results": []}, '/collective_rpc: no "results", one a worker'),
        ("vllm", "/collective_rpc", b"<html>", "unreadable reply: <html>"),
        ("sglang", "/update_weights_from_disk", {"success": False, "message": "no file"}, "no success: no file"),
        ("sglang", "/update_weights_from_disk", [], "no success"),
    ],
)
def test_an_engine_that_says_it_could_not_load_is_an_error(policy, served, tmp_path, reload, path, content, message):
    served.changes.append(lambda asked, reply: content if asked == path else reply)
    with pytest.raises(UnansweredError, match=rf"rollouts: loading .*: .*{message}"):
        engine(policy, served, tmp_path, reload).load(0)


def test_an_engine_without_the_endpoint_is_an_error(policy, served, tmp_path):
    served.told = lambda path, request: (404, {"detail": "Not Found"})
    policy.save_adapters = policy.save
    for reload in BY_NAME:
        by = engine(policy, served, tmp_path / reload, reload)
        with pytest.raises(UnansweredError, match=r"rollouts: loading .*: HTTP 404"):
            by.load(0)


def by_two(rank, size, file, url, folder):
    with group_of(rank, size, file):
        policy = other(1)
        by = Engine(
            policy, Place(Address.of(url).named(60.0), Path(folder), 60.0), BY_NAME["vllm"], ["2+3=?"], Team(rank, size)
        )
        by.load(0)
        torch.manual_seed(rank)
        sampled = by.sample(["2+3=?"] * 2, 4)
        torch.testing.assert_close(sampled.logps, policy.logps(sampled), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_of_several_processes_the_first_loads_and_all_ask(policy, served, tmp_path):
    in_processes(by_two, 2, tmp_path, served.url, str(tmp_path / "served"))
    assert [path for path, *_ in served.asked].count("/collective_rpc") == 1
    assert {of for _, of in served.samples()} == {fingerprint(policy.model)}
    assert len({r["seed"] for r, _ in served.samples()}) == 4


# ---- a request and its reply


def test_a_response_is_a_request_with_a_seed_of_its_own_by_the_generator(policy, served, tmp_path):
    by = engine(policy, served, tmp_path)
    by.load(0)
    questions = ["2+3=?"] * 3 + ["12-7=?"] * 2
    torch.manual_seed(5)
    first = by.sample(questions, 6)
    asked = [r for r, _ in served.samples()]
    assert [r["n"] for r in asked] == [1] * 5
    assert len({r["seed"] for r in asked}) == 5
    assert len({tuple(row) for row in first.tokens[:3].tolist()}) == 3  # of one prompt, and not the same
    assert {(r["temperature"], r["top_p"], r["top_k"], r["repetition_penalty"]) for r in asked} == {(1.0, 1.0, -1, 1.0)}
    assert {r["model"] for r in asked} == {"tiny"}
    ids, seen = policy.encode(questions)
    sent = sorted(row[kept.bool()].tolist() for row, kept in zip(ids, seen, strict=True))
    assert sorted(r["prompt"] for r in asked) == sent
    torch.manual_seed(5)
    again = by.sample(questions, 6)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, by.sample(questions, 6).ids)


LIMITS = Limits(4, (1,), 10)


def choice(tokens=(5, 6, 1), logps=(-1.0, -0.5, -0.1), reason="stop", **more):
    logprobs = {"token_logprobs": list(logps)}
    made = {"index": 0, "token_ids": list(tokens), "logprobs": logprobs, "finish_reason": reason, **more}
    return {"choices": [made]}


def test_a_reply_is_a_response_that_ended_or_is_as_long_as_it_may_be():
    assert read(choice(prompt_token_ids=[7]), [7], LIMITS) == Written([5, 6, 1], [-1.0, -0.5, -0.1], True)
    cut = choice((2, 3, 4, 5), (-1, -1, -1, 1e-6), "length")
    assert read(cut, [7], LIMITS) == Written([2, 3, 4, 5], [-1.0, -1.0, -1.0, 0.0], False)
    assert request("m", [7], LIMITS, 3, greedy=True)["temperature"] == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([], 'no "choices" in the reply'),
        ({"choices": None}, 'no "choices" in the reply'),
        ({"choices": []}, "0 choices in the reply, expected one"),
        ({"choices": choice()["choices"] * 2}, "2 choices in the reply, expected one"),
        ({"choices": ["a"]}, "1 choices in the reply, expected one"),
        (choice(prompt_token_ids=[8]), "it is about other prompt_token_ids than were sent"),
        (choice(token_ids=None), 'no "token_ids": does the server know return_token_ids'),
        (choice(tokens=(5, 10, 1)), r"got token 10, expected ids in \[0, 10\), the policy's vocabulary"),
        (choice(tokens=(5, 2.0, 1)), "got token 2.0"),
        (choice(tokens=(5, True, 1)), "got token True"),
        (choice(logprobs=None), 'no "token_logprobs" in its "logprobs"'),
        (choice(logps=(-1, -1)), "2 log-probs for 3 tokens, expected one a token"),
        (choice(logps=(-1, None, -1)), "got a log-prob of None"),
        (choice(logps=(-1, 0.1, -1)), "got a log-prob of 0.1, expected a number of at most 0"),
        (choice(logps=(-1, float("nan"), -1)), "got a log-prob of nan"),
        (choice(logps=(-1, -9999.0, -1)), "got a log-prob of -9999.0"),
        (choice(logps=(-1, float("-inf"), -1)), "got a log-prob of -inf"),
        (choice(tokens=(1, 6, 1)), "it goes on behind an end token"),
        (choice(tokens=(5, 6, 7)), "it stopped without an end token"),
        (
            choice(tokens=(5, 6, 7), reason="length"),
            "3 tokens, finish_reason 'length', expected an end token or 4 tokens",
        ),
        (choice(tokens=(), logps=(), reason="abort"), "0 tokens, finish_reason 'abort'"),
        (choice(tokens=(5, 6, 7, 8, 1), logps=[-1] * 5), "5 tokens, finish_reason 'stop'"),
    ],
)
def test_a_reply_that_does_not_fit_says_so(reply, message):
    with pytest.raises(UnansweredError, match=message):
        read(reply, [7], LIMITS)


# ---- a server that fails


def test_an_error_names_the_response_and_not_the_key(policy, served, tmp_path):
    by = engine(policy, served, tmp_path)
    by.load(0)
    served.changes.append(lambda path, reply: {"error": KEY} if path == "/v1/completions" else reply)
    with pytest.raises(UnansweredError, match=r'rollouts: response 0: no "choices"') as caught:
        by.sample(["2+3=?"], 4)
    assert KEY not in str(caught.value)
    served.down = True
    with pytest.raises(UnansweredError, match=r"rollouts: response 0: HTTP 503 \(tries: 2\)"):
        by.sample(["2+3=?"], 4)


def test_a_server_that_is_busy_is_asked_again(policy, served, tmp_path):
    by = engine(policy, served, tmp_path)
    by.load(0)
    real, count = served.reply, itertools.count()
    served.reply = lambda path, asked: (503, b"") if next(count) == 0 else real(path, asked)
    assert len(by.sample(["2+3=?"], 4).texts) == 1


def test_a_server_that_is_silent_is_an_error_in_time(policy, served, tmp_path):
    by = engine(policy, served, tmp_path, seconds=5.0)
    by.load(0)
    by.place = by.place._replace(seconds=0.3)
    served.changes.append(lambda path, reply: served.closing.wait(1) or reply)
    with pytest.raises(UnansweredError, match=r"rollouts: response 0: no answer within .* s \(tries: 2\)"):
        by.sample(["2+3=?"], 4)


def test_a_run_whose_engine_fails_ends_and_goes_on_later(served, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = train.update

    def update(*given):
        served.down = given[3].state.update == 1
        return real(*given)

    monkeypatch.setattr(train, "update", update)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name in _OPTIONS]
    command = ["train", "--rollouts", served.url, "--out", str(run), *options]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1, result.output
    assert "rollouts: loading" in result.stderr
    assert f"the checkpoint from before is kept; to go on: prefixloss train --resume {run}" in result.stderr
    served.down = False
    monkeypatch.setattr(train, "update", real)
    result = CliRunner().invoke(cli.app, ["train", "--resume", str(run)])
    assert result.exit_code == 0, result.output
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1 + SMALL["updates"]


_OPTIONS = {name for name in SMALL if name not in ("min_steps", "max_steps")}


# ---- settings


@pytest.mark.parametrize(
    ("names", "url", "message"),
    [
        (("a", "b"), "{}", "got no name, expected MODEL@URL with one of the server's models: a, b"),
        (("a",), "b@{}", "got 'b', expected MODEL@URL with one of the server's models: a"),
    ],
)
def test_a_model_that_the_server_has_not_is_named_before_any_work(tmp_path, names, url, message):
    with serving(other().model, names=names) as server:
        config = Config(**SMALL, rollouts=url.format(server.url))
        with pytest.raises(UsageError, match=f"--rollouts: {message}"):
            train.train(config, tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_not_there_is_named_before_any_work(tmp_path):
    config = Config(**{**SMALL, "timeout": 1.0}, rollouts="http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match=r"--rollouts: /models: .*no answer"):
        train.train(config, tmp_path / "run", quiet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": "localhost:8000"}, "--rollouts: expected URL or MODEL@URL with http://... or https://..."),
        ({"rollouts": "a:secret@localhost"}, "--rollouts: expected URL or MODEL@URL"),
        ({"rollouts": ""}, "--rollouts: got '', expected a name"),
        (
            {"rollouts": "16"},
            "--rollouts: expected URL or MODEL@URL with http://... or https://... (a number of continuations is --cont",
        ),
        ({"reload": "nccl"}, "--reload: got 'nccl', expected one of vllm, vllm-lora, sglang"),
        ({"reload": "vllm-lora"}, "--reload: got 'vllm-lora', expected --lora with it"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(UsageError) as caught:
        Config(**options)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["rollouts", "teacher"])
def test_without_a_client_for_servers_it_is_named(monkeypatch, name):
    monkeypatch.setattr("prefixloss.rl.config.find_spec", lambda package: None)
    with pytest.raises(UsageError, match=f"--{name}: a server needs httpx, which is not installed: pip install httpx"):
        Config(**{name: "http://h/v1"})
    Config(teacher="a-directory")


def test_addresses():
    assert Address.of("http://h:1/v1") == ("http://h:1/v1", None)
    assert Address.of("org/model-7b@http://h:1/v1/") == ("http://h:1/v1/", "org/model-7b")
    assert Address.of("org/model-7b@http://h:1/v1/").root == "http://h:1"
    assert Address.of("https://h/engine").root == "https://h/engine"
    assert Address.of("org/model") is None
    assert json.loads(json.dumps(Config(rollouts="http://h").__dict__))["rollouts"] == "http://h"
