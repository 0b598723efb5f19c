"""Row statistics and logit gradients against float64 autograd, where rows are hard."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefixloss.backends import reference
from prefixloss.maths.softmax import (
    Coefficients,
    Transform,
    keep_rows_,
    logit_gradient_,
    probabilities,
    row_stats,
)

IDENTITY = Transform.of(1.0, None, 1.0)
# 7: no vector width divides it; 1,030: no block does; 300,000: more than one block holds, so one row a block
VOCABULARIES = [2, 7, 1030, 300_000]


def rows(vocabulary: int, dtype: torch.dtype, n: int = 5, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    scores = spread * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    return scores.to(dtype), torch.randint(vocabulary, (n,), generator=generator)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_match_float64(vocabulary: int, dtype: torch.dtype) -> None:
    scores, tokens = rows(vocabulary, dtype)
    ref_scores = scores.flip(0) * 0.5
    exact, ref_exact = scores.double(), ref_scores.double()
    probs = scores.clone()
    stats = row_stats(probs, tokens, probs, ref_scores)
    # pairwise sums: a few ulps of scores up to about 20; a term's exp adds the ulps of its argument
    tolerance = {"rtol": 3e-6, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for got, want in (
        (stats.logp, reference.log_probs(exact, tokens)),
        (stats.lse, exact.logsumexp(1)),
        (stats.entropy, reference.entropies(exact)),
        (stats.kl, reference.exact_kl(exact, ref_exact)),
        (stats.ref_lse, ref_exact.logsumexp(1)),
        (probs / stats.total[:, None], exact.softmax(1)),
    ):
        torch.testing.assert_close(got.double(), want, **tolerance)
    again = torch.empty_like(scores)
    probabilities(scores, again)
    assert torch.equal(again, probs)


@pytest.mark.parametrize("vocabulary", VOCABULARIES[:3])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("penalties", [(False, False), (True, False), (False, True), (True, True)])
def test_gradient_is_that_of_autograd(vocabulary: int, softcap: float | None, penalties: tuple[bool, bool]) -> None:
    logits, tokens = rows(vocabulary, torch.float64)
    ref_logits = logits.flip(1)
    transform = Transform.of(0.7, softcap, 1.3)

    def scores_of(z: Tensor) -> Tensor:
        return transform.cap_(z * transform.before)

    g, e, k = torch.randn(3, len(tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()
    scores = leaf * 1.3
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) / 0.7
    ref_scores = scores_of(ref_logits)
    loss = (g * reference.log_probs(scores, tokens)).sum()
    loss = loss + (e * reference.entropies(scores)).sum() * penalties[0]
    loss = loss + (k * reference.exact_kl(scores, ref_scores)).sum() * penalties[1]
    (want,) = torch.autograd.grad(loss, leaf)

    probs = scores_of(logits)
    stats = row_stats(probs, tokens, probs, ref_scores if penalties[1] else None)
    coefficients = Coefficients(g, e if penalties[0] else None, k if penalties[1] else None)
    got = logit_gradient_(probs, tokens, stats, coefficients, transform, ref_scores) * transform.before
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
def test_log_prob_near_zero_keeps_relative_accuracy_in_float32(gap: float) -> None:
    # one token `gap` above 6 equal others: logp = -log(1 + 6 exp(-gap)), down to -1e-34
    scores = torch.zeros(1, 7)
    scores[0, 3] = gap
    stats = row_stats(scores, torch.tensor([3]), torch.empty_like(scores))
    # exp of a float32 gap: its argument's rounding alone is gap * 2^-24
    assert stats.logp.item() == pytest.approx(-math.log1p(6 * math.exp(-gap)), rel=1e-5)
    probs = scores.clone()
    stats = row_stats(probs, torch.tensor([3]), probs)
    ones = Coefficients(torch.ones(1), None, None)
    gradient = logit_gradient_(probs, torch.tensor([3]), stats, ones, IDENTITY)
    assert gradient[0, 3].item() == pytest.approx(6 * math.exp(-gap) / (1 + 6 * math.exp(-gap)), rel=1e-5)


def test_unlikely_token_keeps_its_log_prob_where_its_probability_underflows() -> None:
    scores = torch.zeros(1, 5)
    scores[0, 2] = 500.0
    assert row_stats(scores, torch.tensor([0]), scores).logp.item() == -500.0


@pytest.mark.parametrize("value", [-1e30, -3e4, 0.0, 3e4, 1e30])
def test_equal_logits_of_any_size_are_uniform(value: float) -> None:
    scores = torch.full((2, 9), value)
    stats = row_stats(scores, torch.tensor([0, 8]), scores)
    torch.testing.assert_close(stats.logp, torch.full((2,), -math.log(9)))
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(9)))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_banned_tokens_have_probability_zero_everywhere(softcap: float | None) -> None:
    transform = Transform.of(1.0, softcap, 1.0)
    logits = torch.tensor([[0.5, -math.inf, 1.0, -math.inf], [0.1, 0.2, -math.inf, 0.3]])
    ref_logits = logits.roll(1, 1).nan_to_num(neginf=0.0)
    tokens = torch.tensor([2, 0])
    probs, ref_scores = transform.cap_(logits.clone()), transform.cap_(ref_logits.clone())
    banned = logits == -math.inf
    stats = row_stats(probs, tokens, probs, ref_scores)
    assert torch.equal(probs == 0, banned)
    coefficients = Coefficients(torch.ones(2), torch.ones(2), torch.ones(2))
    gradient = logit_gradient_(probs, tokens, stats, coefficients, transform, ref_scores)
    assert all(bool(x.isfinite().all()) for x in (*stats, gradient))
    assert bool((gradient[banned] == 0).all())
    kept = logits.masked_fill(banned, -1e4)  # the same without -inf: exp(-1e4) is 0 as well
    if softcap is None:
        torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=kept).entropy())


def test_reference_that_bans_what_the_policy_may_say_has_infinite_kl() -> None:
    scores = torch.zeros(1, 3)
    stats = row_stats(scores, torch.tensor([0]), scores, torch.tensor([[0.0, 0.0, -math.inf]]))
    assert stats.kl is not None
    assert stats.kl.item() == math.inf


def test_token_alone_in_the_vocabulary_is_certain() -> None:
    scores = torch.tensor([[2.0]])
    stats = row_stats(scores, torch.tensor([0]), scores)
    assert (stats.logp.item(), stats.entropy.item()) == (0.0, 0.0)


@pytest.mark.parametrize("vocabulary", [3, 300_000])
def test_kept_rows_move_to_the_front_in_order(vocabulary: int) -> None:
    scores = torch.arange(6.0)[:, None].expand(6, vocabulary).clone()
    assert keep_rows_(scores, torch.tensor([1, 2, 5]))[:, 0].tolist() == [1, 2, 5]
