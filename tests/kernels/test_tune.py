"""The opt-in choice of launches."""

import pytest
import torch

from prefixloss import LossConfig, linear_prefix_loss, prefix_loss


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Turns autotuning on, with made-up times: the last of the choices is the fastest."""
    from prefixloss._kernels import tune  # noqa: PLC0415

    times: list[float] = []

    def timer(run) -> float:
        run()
        times.append(-float(len(times)))
        return times[-1]

    choose = tune.best_launch
    monkeypatch.setenv("PREFIXLOSS_AUTOTUNE", "1")
    monkeypatch.setattr(tune, "_ROWS", 2)
    monkeypatch.setattr(tune, "_BEST", {})
    monkeypatch.setattr(tune, "best_launch", lambda problem, grads: choose(problem, grads, timer))
    return times


def call(**options) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.linspace(-3, 3, 4 * 5000, device=device).sin().reshape(4, 5000).requires_grad_()
    tokens, advantages = torch.arange(4, device=device), torch.ones(4, device=device)
    loss = prefix_loss(logits, tokens, advantages, config=LossConfig(**options), backend="triton").loss
    loss.sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_each_kind_of_problem_is_timed_once_and_the_fastest_launch_is_kept(timed: list[float]) -> None:
    from prefixloss._kernels import tune  # noqa: PLC0415

    call()
    tried = len(timed)
    assert tried > 3
    assert len(tune._BEST) == 1
    call()
    call(clip_high=0.3, temperature=0.7)
    assert len(timed) == tried  # only a number changed
    call(reduction="none")
    assert len(timed) > tried


def test_a_tuned_launch_gives_the_same_gradient(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = call()
    monkeypatch.delenv("PREFIXLOSS_AUTOTUNE")
    # sums of 5,000 terms in another order: a few float32 roundings of the largest entry
    torch.testing.assert_close(tuned, call(), rtol=1e-5, atol=1e-6 * tuned.abs().max().item())


def test_without_the_option_nothing_is_timed(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIXLOSS_AUTOTUNE")
    call()
    assert timed == []


def test_a_timed_gradient_gets_the_rows_that_a_real_one_gets(
    timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where log-probs alone are asked for, a token has three coefficients: of its log-prob, its entropy and its KL."""
    from prefixloss._kernels import rows  # noqa: PLC0415

    launch, seen = rows.launch_gradient, set()

    def noted(problem, stats, coefficients, *others):
        seen.add((len(stats), len(coefficients)))
        return launch(problem, stats, coefficients, *others)

    monkeypatch.setattr(rows, "launch_gradient", noted)
    call(reduction="none")
    assert seen == {(7, 3)}


def test_timed_rows_start_at_whole_vectors_where_the_real_ones_do(
    timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk's rows do, whatever the vocabulary; a kernel made for them must get no others."""
    from prefixloss._kernels import rows  # noqa: PLC0415

    launch, seen = rows.launch_rows, []

    def noted(problem, stats, terms, grads, scales):
        seen.append((problem.work.aligned, problem.logits.stride(0) % 4 == 0, grads.stride(0) % 4 == 0))
        return launch(problem, stats, terms, grads, scales)

    monkeypatch.setattr(rows, "launch_rows", noted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = (torch.linspace(-1, 1, 3 * n, device=device).reshape(n, 3).requires_grad_() for n in (2, 301))
    tokens, advantages = torch.arange(2, device=device), torch.ones(2, device=device)
    linear_prefix_loss(hidden, weight, tokens, advantages, backend="triton").loss.backward()
    assert len(seen) > 1
    assert set(seen) == {(True, True, True)}
