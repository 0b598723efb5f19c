"""A served teacher in the loop, against the same teacher in this process; and servers that cannot be one."""

import pytest
import torch
from rich.console import Console
from served_model import KEY, serving

from prefixloss import linear_distill_loss
from prefixloss.io import endpoint
from prefixloss.io.endpoint import UnansweredError
from prefixloss.rl import UsageError, train
from prefixloss.rl.config import Config
from prefixloss.rl.optimise import Stepper
from prefixloss.rl.policy import tiny_policy, tiny_tokenizer
from prefixloss.rl.report import Report
from prefixloss.rl.start import open_teacher
from prefixloss.rl.teachers import says

TEXTS = ["Step 1: 2+3=5\nAnswer: 5", "Answer: 6", "Step 1: 2+3=4\nAnswer: 4"]
ROWS = torch.arange(len(TEXTS))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)


def model(seed, hidden=16):
    torch.manual_seed(seed)
    made = tiny_policy(hidden, 1)
    made.model.requires_grad_(seed == 1)
    return made


@pytest.fixture
def policy():
    return model(1)


@pytest.fixture
def teacher():
    return model(2, 24)


@pytest.fixture
def served(teacher):
    with serving(teacher.model, tokenizer=teacher.tokenizer) as server:
        yield server


def written(policy):
    return policy.written(["2+3=?"] * 2 + ["12+3=?"], TEXTS)


def opened(policy, served, **options):
    return open_teacher(Config(teacher=served.url, timeout=30.0, **options), policy, "cpu")


def distilled(policy, sampled, weights, arguments, **options):
    policy.model.zero_grad()
    out = linear_distill_loss(
        policy.hidden(sampled),
        policy.weight,
        mask=sampled.mask,
        weights=weights,
        normalizer=2.0,
        **arguments,
        **options,
    )
    out.loss.backward()
    return out, torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def chosen(sampled):
    """The second half of the first response, nothing of the second, all of the third."""
    weights = sampled.mask.float()
    weights[0, :5] = 0
    weights[1] = 0
    return weights


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_it_is_the_same_teacher_in_this_process_with_its_likeliest_tokens(policy, teacher, served, divergence):
    sampled = written(policy)
    weights = chosen(sampled)
    there, gradient = distilled(
        policy, sampled, weights, says(opened(policy, served, teacher_top=3), policy, sampled, weights)(ROWS),
        divergence=divergence,
    )  # fmt: skip
    with torch.no_grad():
        logps = torch.log_softmax(teacher.logits(teacher.hidden(sampled)), -1)
        top = logps.topk(3).indices
        # the server lists the token itself too, where it is not among the likeliest
        own = sampled.tokens[..., None]
        ids = torch.cat([top, torch.where((top == own).any(-1, keepdim=True), -1, own)], -1)
        listed = {"teacher_ids": ids, "teacher_logps": logps.gather(-1, ids.clamp(min=0))}
    here, expected = distilled(policy, sampled, weights, listed, divergence=divergence)
    assert there.loss > 0
    # float32 log-probs of a model whose products are of another shape, without padding
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_with_all_ids_it_is_the_whole_teacher(policy, teacher, served):
    sampled = written(policy)
    weights = chosen(sampled)
    every = opened(policy, served, teacher_top=len(policy.weight))
    there, gradient = distilled(policy, sampled, weights, says(every, policy, sampled, weights)(ROWS))
    here, expected = distilled(policy, sampled, weights, says(teacher, policy, sampled, weights)(ROWS))
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_it_is_asked_once_and_only_from_the_first_weighed_token_on(policy, served):
    sampled = written(policy)
    by = opened(policy, served, teacher_top=2)
    served.asked.clear()
    what = says(by, policy, sampled, chosen(sampled))
    parts = [what(rows) for rows in (torch.tensor([2, 0]), torch.tensor([1]))]
    assert len(served.asked) == 2  # nothing of the second response
    lengths, width = sampled.mask.sum(1).tolist(), sampled.mask.shape[1]
    counts = parts[0]["teacher_offsets"].diff().view(2, width)
    assert ((counts > 0) == (torch.arange(width) < lengths[2])[None]).all(1)[0]
    assert (counts[1, :5] == 0).all()
    assert (counts[1, 5 : lengths[0]] > 0).all()
    assert (counts[1, lengths[0] :] == 0).all()
    assert parts[1]["teacher_offsets"].tolist() == [0] * (width + 1)


def learned(policy, teacher, config):
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    policy.sample = lambda questions, _: policy.written(questions, [TEXTS[0], TEXTS[2]] * 2)
    stepper = Stepper(config, policy.model, torch.optim.SGD(policy.model.parameters(), lr=config.lr))
    problems = [train.task.Problem(q, "5", ("Step 1: 2+3=5", "Answer: 5")) for q in ("2+3=?", "12+3=?")]
    metrics = train.learn(config, policy, model(1), stepper, problems, teacher=teacher)
    end = torch.nn.utils.parameters_to_vector(policy.model.parameters()).detach().clone()
    policy.model.load_state_dict(start)
    return end, metrics


@pytest.mark.parametrize("micro", [1, 2])
def test_an_update_beside_it_is_the_same_as_beside_the_teacher_itself(policy, teacher, served, micro):
    small = {"prompts": 2, "group": 2, "minibatches": 1, "micro_prompts": micro, "lr": 0.5, "lr_warmup": 0, "epochs": 2}
    config = Config(**small, teacher=served.url, teacher_top=len(policy.weight), timeout=30.0)
    by, metrics = learned(policy, open_teacher(config, policy, "cpu"), config)
    own, expected = learned(policy, teacher, config)
    torch.testing.assert_close(by, own, rtol=1e-4, atol=1e-5)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert metrics["divergence"] > 0
    without, _ = learned(policy, None, config)
    assert not torch.allclose(without, own, atol=1e-3)


def test_a_run_beside_a_served_teacher(served, tmp_path):
    small = {
        "updates": 2, "prompts": 2, "group": 2, "max_tokens": 6, "minibatches": 1, "eval_every": 2, "eval_problems": 1,
        "eval_samples": 1, "k": 1, "hidden_size": 16, "layers": 1, "warm_steps": 0, "distill_from": "all",
        "advantage": "none", "timeout": 30.0,
    }  # fmt: skip
    report = Report(Console(quiet=True))
    history = train.train(Config(**small, teacher=f"tiny@{served.url}", teacher_top=5), tmp_path, report)
    assert all(m["divergence"] > 0 for m in history[1:])
    assert {r["prompt_logprobs"] for path, r, _ in served.asked if path == "/v1/completions"} == {5}


# ---- what cannot be


def test_a_teacher_that_does_not_answer_ends_the_update(policy, served):
    by = opened(policy, served)
    served.changes.append(lambda path, reply: {"choices": []} if path == "/v1/completions" else reply)
    sampled = written(policy)
    with pytest.raises(UnansweredError, match=r'teacher: sequence [02]: no "prompt_logprobs" in the reply'):
        says(by, policy, sampled, chosen(sampled))


def test_a_served_teacher_with_other_tokens_is_refused(policy, served):
    class Other:
        def encode(self, text, add_special_tokens):
            return [1 + token for token in tiny_tokenizer().encode(text, add_special_tokens=add_special_tokens)]

    served.tokenizer = Other()
    with pytest.raises(UsageError, match="--teacher: 'tiny' has another tokenizer than the policy"):
        opened(policy, served)
    served.tokenizer = None
    with pytest.raises(UsageError, match="--teacher: /tokenize: HTTP 404"):
        opened(policy, served)
    served.down = True
    with pytest.raises(UsageError, match="--teacher: /models: HTTP 503"):
        opened(policy, served)


def test_a_teacher_scales_its_logits_in_its_own_way(policy, teacher):
    sampled = written(policy)
    weights = sampled.mask.float()
    teacher.logit_scale, policy.logit_scale = 3.0, 0.5
    scaled, _ = distilled(policy, sampled, weights, says(teacher, policy, sampled, weights)(ROWS), logit_scale=0.5)
    with torch.no_grad():
        logits = teacher.logits(teacher.hidden(sampled))
    listed = logits.log_softmax(-1).topk(logits.shape[-1])
    plain = {"teacher_ids": listed.indices, "teacher_logps": listed.values}
    expected, _ = distilled(policy, sampled, weights, plain, logit_scale=0.5)
    torch.testing.assert_close(scaled.loss, expected.loss, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_another_cap_is_refused(policy, teacher, tmp_path):
    teacher.save(tmp_path)
    policy.softcap = 30.0
    with pytest.raises(UsageError, match=r"--teacher: .* has logits capped at None, the policy's at 30.0"):
        open_teacher(Config(teacher=str(tmp_path)), policy, "cpu")
