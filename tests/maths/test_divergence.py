"""Divergences and their closed slopes against autograd through the plain sums in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefixloss.maths.divergence import BY_NAME, LEAST_LEFT, Divergence, Listed, Parts

INF = math.inf
ALL = [("reverse", 0.5), ("forward", 0.5)] + [
    (n, b) for n in ("jsd", "skew-forward", "skew-reverse") for b in (0.1, 0.5, 0.9)
]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), [n]; probabilities, none of them 0."""
    return (p * (p / q).log()).sum(-1)


def plain(name: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    m = beta * q + (1 - beta) * p
    return {
        "reverse": lambda: kl(p, q),
        "forward": lambda: kl(q, p),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skew-forward": lambda: kl(q, m),
        "skew-reverse": lambda: kl(p, m),
    }[name]()


def scores(seed: int, n: int = 5, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    student, teacher = 3 * torch.randn(2, n, vocabulary, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_the_table_is_what_is_tested() -> None:
    assert {name for name, _ in ALL} == set(BY_NAME)


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_whole_vocabulary(name: str, beta: float) -> None:
    student, teacher = scores(0)
    expected = plain(name, beta, student.softmax(1), teacher.softmax(1))
    (slope,) = torch.autograd.grad(expected.sum(), student)
    value, gradient = Divergence(name, beta).whole(student.detach(), teacher, Parts())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("name", "beta"), ALL)
@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_listed_ids_with_the_rest_as_one_class(name: str, beta: float, count: int) -> None:
    student, teacher = scores(1)
    ids = torch.stack([torch.randperm(9)[: max(count, 1)] for _ in range(5)])
    used = torch.arange(max(count, 1))[None] < torch.tensor([count, count, max(count - 2, 0), 0, count])[:, None]
    listed = torch.where(used, ids, -1)
    q, p = teacher.softmax(1), student.softmax(1)
    logps = torch.where(used, q.log().gather(1, ids), math.nan)

    def classes(x: Tensor, row: int) -> Tensor:
        chosen = ids[row][used[row]]
        return torch.cat([x[row, chosen], x[row].sum()[None] - x[row, chosen].sum()])

    expected = torch.stack([plain(name, beta, classes(p, i), classes(q, i)) for i in range(5)])
    (slope,) = torch.autograd.grad(expected.sum(), student)
    said = Listed.of(listed, logps, torch.float64, 9, 1e-3)
    value, gradient = Divergence(name, beta).listed(student.detach(), said, Parts())
    # the tail by a difference of float64 sums near 1, in the plain formula
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_a_list_of_all_ids_is_the_whole_vocabulary(name: str, beta: float) -> None:
    student, teacher = scores(2)
    ids = torch.stack([torch.randperm(9) for _ in range(5)])
    logps = teacher.log_softmax(1).gather(1, ids)
    value, gradient = Divergence(name, beta).whole(student.detach(), teacher, Parts())
    listed = Listed.of(ids, logps, torch.float64, 9, 1e-3)
    assert (listed.tail == -INF).all()
    got, slope = Divergence(name, beta).listed(student.detach(), listed, Parts())
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(slope, gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_classes_that_one_or_both_cannot_have(name: str, beta: float) -> None:
    """By definition: 0 where neither can; infinite where only the first argument of a KL can; never NaN."""
    student, teacher = (x.detach().clone() for x in scores(3, n=4))
    student[0, 0] = teacher[0, 0] = -INF  # both
    student[1, 1] = -INF  # the student alone
    teacher[2, 2] = -INF  # the teacher alone
    student[3, :5], teacher[3, 5:] = -INF, -INF  # nothing in common
    value, gradient = Divergence(name, beta).whole(student, teacher, Parts())
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    infinite = {"reverse": [False, False, True, True], "forward": [False, True, False, True]}
    assert (value == INF).tolist() == infinite.get(name, [False] * 4)
    assert not gradient[value == INF].any()
    for i in range(4):  # without the classes that count for nothing
        possible = (student[i] > -INF) | (teacher[i] > -INF)
        a, b = (torch.where(x == -INF, -1e5, x).double()[i, possible] for x in (student, teacher))
        if value[i] < INF:
            leaf = a.clone().requires_grad_()
            p, q = leaf.softmax(0), b.softmax(0)
            m = beta * q + (1 - beta) * p
            expected = {
                "reverse": lambda p=p, q=q: torch.xlogy(p, p).sum() - torch.xlogy(p, q.clamp(min=1e-300)).sum(),
                "forward": lambda p=p, q=q: torch.xlogy(q, q).sum() - torch.xlogy(q, p.clamp(min=1e-300)).sum(),
                "skew-forward": lambda q=q, m=m: torch.xlogy(q, q).sum() - torch.xlogy(q, m).sum(),
                "skew-reverse": lambda p=p, m=m: torch.xlogy(p, p).sum() - torch.xlogy(p, m).sum(),
            }
            expected["jsd"] = lambda e=expected: beta * e["skew-forward"]() + (1 - beta) * e["skew-reverse"]()
            torch.testing.assert_close(value[i], expected[name]().detach(), rtol=1e-12, atol=1e-13)


def test_known_values() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 - ln 3 / 2, KL(q||p) = 3/4 ln 3 - ln 2; for beta 1/2 the mixture
    is (3/8, 5/8)."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    js = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
    for name, expected in (
        ("reverse", math.log(2) - math.log(3) / 2), ("forward", 0.75 * math.log(3) - math.log(2)), ("jsd", js),
    ):  # fmt: skip
        value, _ = Divergence(name, 0.5).whole(student, teacher, Parts())
        assert float(value) == pytest.approx(expected, rel=1e-14)


def test_the_tail_keeps_its_digits_where_the_listed_ids_are_nearly_all() -> None:
    logps = torch.tensor([[-3e-9, math.log(1e-9), 0.0]]).double()
    listed = Listed.of(torch.tensor([[3, 5, -1]]), logps, torch.float64, 9, 1e-3)
    # 1 - exp(-3e-9) - 1e-9, to first order 2e-9
    assert float(listed.tail.exp()) == pytest.approx(2e-9, rel=1e-7)
    none = torch.zeros(2, 0)
    assert Listed.of(none.long(), none, torch.float32, 9, 1e-3).tail.tolist() == [0, 0]


def test_rounded_log_probs_leave_something_to_others_and_nothing_to_nobody() -> None:
    def tail(logps: list[float], vocabulary: int) -> float:
        return float(Listed.of(torch.tensor([[0, 1]]), torch.tensor([logps]), torch.float64, vocabulary, 1e-3).tail)

    more, less = [0.0, -12.0], [-0.6935, -0.6935]
    assert tail(more, 9) == math.log(LEAST_LEFT)
    assert tail(more, 2) == tail(less, 2) == -INF
    assert tail(less, 9) == pytest.approx(math.log(1 - 2 * math.exp(-0.6935)), rel=1e-3)
    # what is more than rounding is the teacher's, of ids that the student has not
    assert tail([-1.0, -1.0], 2) == pytest.approx(math.log(1 - 2 * math.exp(-1)))


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_a_class_too_improbable_for_float32_counts_as_in_float64(name: str, beta: float) -> None:
    """Its probabilities and their mixture are 0 there, its log-probs are not."""
    student, teacher = (x.detach() for x in scores(4))
    student[:, 0], teacher[:, 0] = -150.0, -120.0
    exact = Divergence(name, beta).whole(student, teacher, Parts())
    for got, want in zip(Divergence(name, beta).whole(student.float(), teacher.float(), Parts()), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)  # float32 terms of size 10


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_a_row_has_the_same_bits_beside_one_that_bans_a_class(name: str, beta: float) -> None:
    student, teacher = (x.detach().float() for x in scores(5))
    alone = Divergence(name, beta).whole(student[:1], teacher[:1], Parts())
    student[1, 2] = teacher[2, 3] = -INF
    for got, want in zip(Divergence(name, beta).whole(student, teacher, Parts()), alone, strict=True):
        assert torch.equal(got[:1], want)


class OfTwo(Parts):
    """Another process has as much of each distribution as one class with a score of 0, and no divergence."""

    def logsumexp(self, logs: Tensor) -> Tensor:
        return torch.logaddexp(logs, torch.zeros_like(logs))


@pytest.mark.parametrize(("name", "beta"), ALL)
def test_a_part_whose_classes_are_all_banned_is_no_nan(name: str, beta: float) -> None:
    student, teacher = (x.detach() for x in scores(6))
    value, gradient = Divergence(name, beta).whole(torch.full_like(student, -INF), teacher, OfTwo())
    assert (value == INF).all() if name == "forward" else value.isfinite().all()
    assert gradient.isfinite().all()
