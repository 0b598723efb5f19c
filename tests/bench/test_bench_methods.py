"""The benchmark's methods and its float64 truth: every peer computes the same loss, and the truth is autograd's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from bench.speed.cases import Case, Head
from bench.speed.errors import Wrong, answer_of, compared_rows, inputs, truth_of
from bench.speed.inputs import Linear, Logits, capped, expected_logps, policy_terms, random_head, token_logps
from bench.speed.methods import METHODS
from bench.speed.settings import SETTINGS, credit_of
from bench.speed.worker import Worker, full_inputs, resident_before

CPU = torch.device("cpu")
HEAD = Head("24x96", 24, 96)
CAPPED = Head("24x96", 24, 96, 5.0)
# what compiles takes seconds for each: once is enough, in the last test
QUICK = [
    (start, name) for start, methods in METHODS.items() for name, m in methods.items() if not (m.compiles or m.gpu_only)
]
COMPILED = [(start, name) for start, methods in METHODS.items() for name, m in methods.items() if m.compiles]


def case_of(start: str = "hidden", dtype: str = "float32", head: Head = HEAD, setting: str = "dense") -> Case:
    return Case("custom", head, 64, dtype, setting, start)


def skip_unless_installed(start: str, name: str) -> None:
    needs = METHODS[start][name].needs
    if needs and not importlib.util.find_spec(needs[1]):
        pytest.skip(f"{needs[0]} is not installed")


def truth_by_autograd(data: Linear | Logits) -> dict[str, Tensor]:
    """The formula, dense, in float64."""
    if isinstance(data, Logits):
        leaf = data.given.double().requires_grad_()
        logps = token_logps(leaf, data.tokens)
        terms = policy_terms(
            logps, data.old.double(), data.ref.double(), data.advantages[:, None].double(), data.kl_coef
        )
        (grad,) = torch.autograd.grad(terms.mean(), leaf)
        return {"loss": terms.mean(), "logps": logps.flatten(), "d_logits": grad.flatten(0, 1)}
    hidden, weight = (x.detach().double().requires_grad_() for x in data.leaves)
    logps = token_logps(capped(hidden @ weight.T, data.softcap), data.tokens)
    terms = policy_terms(logps, data.old.double(), data.ref.double(), data.advantages.double(), data.kl_coef)
    d_hidden, d_weight = torch.autograd.grad(terms.mean(), (hidden, weight))
    return {"loss": terms.mean(), "logps": logps, "d_hidden": d_hidden, "d_weight": d_weight[compared_rows(data)]}


@pytest.mark.parametrize("case", [case_of(), case_of(head=CAPPED), case_of(dtype="bfloat16"), case_of("logits")])
def test_truth_is_autograds(case: Case) -> None:
    for data in inputs(case, CPU):
        truth = truth_of(data)
        for name, value in truth_by_autograd(data).items():
            # float64 sums of at most 96 terms of size 1
            torch.testing.assert_close(truth[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("start", "name"), [pair for pair in QUICK if not METHODS[pair[0]][pair[1]].floor])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_methods_compute_the_same_loss_and_gradients(start: str, name: str, dtype: str) -> None:
    skip_unless_installed(start, name)
    wrong = Wrong()
    case = case_of(start, dtype)
    for data in inputs(case, CPU):
        step = METHODS[start][name].make(data)
        found = {key: value.clone() for key, value in answer_of(step, data).items()}
        wrong.add(found, truth_of(data), answer_of(step, data))
    # the naive formula's cancellation near log-prob 0 costs some digits; bf16 logits near 20 are rounded to 1/16
    limit = {"float32": 3e-5, "bfloat16": 6e-2}[dtype]
    found_errors = {key: value for key, value in wrong.relative().items() if key not in ("tokens", "draws")}
    assert found_errors
    assert all(error < limit for error in found_errors.values()), found_errors
    assert wrong.repeats


@pytest.mark.parametrize("name", ["ours", "picked", "naive", "torch"])
@pytest.mark.parametrize("setting", ["vppo-relu", "neutral-prefix", "half-solved"])
def test_methods_that_leave_tokens_out_still_get_the_whole_loss(name: str, setting: str) -> None:
    data = full_inputs(case_of(setting=setting), CPU)
    assert isinstance(data, Linear)
    assert not data.learning.all()
    truth = truth_by_autograd(data)
    step = METHODS["hidden"][name].make(data)
    loss = step()
    assert loss is not None
    # float32 sums of at most 96 terms, against the size of the loss's terms, about 1
    torch.testing.assert_close(loss.double(), truth["loss"], rtol=0, atol=3e-6)
    assert data.hidden.grad is not None
    torch.testing.assert_close(data.hidden.grad.double(), truth["d_hidden"], rtol=1e-4, atol=1e-6)
    assert not data.hidden.grad[~data.learning].any()


def test_softcapped_heads_run_where_the_method_has_a_cap() -> None:
    for name in ("ours", "naive", "picked", "trl"):
        skip_unless_installed("hidden", name)
        data = full_inputs(case_of(head=CAPPED, setting="grpo"), CPU)
        loss = METHODS["hidden"][name].make(data)()
        assert loss is not None
        torch.testing.assert_close(loss.double(), truth_by_autograd(data)["loss"], rtol=0, atol=3e-6)


def test_recorded_log_probs_lie_near_the_policys() -> None:
    # the law of large numbers over 8,191 other tokens: e^(s^2/2) is met to a few per cent
    weight = random_head(CPU, 64, 8192, torch.float32)
    credit = credit_of(512, SETTINGS["grpo"])
    data = Linear.of(weight, *credit)
    own = token_logps(data.hidden.detach() @ weight.T, data.tokens)
    expected = expected_logps(data.hidden, weight, data.tokens)
    assert (own - expected).abs().max() < 0.2
    # the policy is sure of some tokens and doubts others
    assert own.min() < -3
    assert own.max() > -0.01


@pytest.mark.parametrize(("start", "name"), QUICK)
def test_a_worker_measures_every_method(start: str, name: str) -> None:
    skip_unless_installed(start, name)
    threads = torch.get_num_threads()
    order = {"case": case_of(start).as_json(), "method": name, "threads": threads, "device": "cpu", "turn_seconds": 0.0}
    worker = Worker(order)
    assert worker.load(order) == {}
    warmed = worker.warm(order)
    assert warmed["call_seconds"] <= warmed["warm_seconds"]
    first, second = worker.turn(order), worker.turn(order)
    assert first["forward"] >= 0
    assert first["both"] >= max(first["forward"], first["backward"])
    assert first["bits"] == second["bits"]
    gradients = 0 if METHODS[start][name].floor else 4 * (64 * 24 + 96 * 24 if start == "hidden" else 64 * 96)
    if resident_before() and name != "ours-inplace":
        assert warmed["gradient_bytes"] == gradients


def test_peak_memory_is_what_a_call_holds() -> None:
    if not resident_before():
        pytest.skip("resident memory is read from Linux's /proc")
    case = case_of(head=Head("64x16384", 64, 16384))._replace(tokens=512)
    order = {"case": case.as_json(), "method": "floor", "threads": torch.get_num_threads(), "device": "cpu"}
    worker = Worker(order)
    worker.load(order)
    # 512 x 16,384 float32 logits and two small gradients (4 MiB the larger); 4 MiB for what else a process does
    assert 2**25 <= worker.warm(order)["peak_bytes"] <= 2**25 + 2**23


@pytest.mark.slow
@pytest.mark.parametrize(("start", "name"), COMPILED)
def test_methods_that_compile_compute_the_same_loss(start: str, name: str) -> None:
    test_methods_compute_the_same_loss_and_gradients(start, name, "float32")
