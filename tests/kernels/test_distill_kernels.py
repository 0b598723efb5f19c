"""The device code of distillation: a divergence's terms value by value, and the kernel over rows, against float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from test_kernels import DEVICE, GUARD, HALF_ULP, INF, NAN, behind, columns, gapped, head_chunks, on_device, within
from torch import Tensor

from prefixloss import LossConfig
from prefixloss._kernels import divergence as device_form
from prefixloss._kernels.distill import DistillProblem, Rows, launch_distill
from prefixloss._kernels.divergence import class_terms
from prefixloss._kernels.launch import Launch
from prefixloss.backends.triton import distill
from prefixloss.inputs.distillation import Teacher
from prefixloss.maths.divergence import BY_NAME, Classes

NAMES = list(BY_NAME)
SMALL = Launch(32, 4, 1)  # 128 logits a block
BETA = 0.3

every_divergence = pytest.mark.parametrize("name", NAMES)


# --- a divergence's terms


@triton.jit
def terms_kernel(a_ptr, b_ptr, out_ptr, size, beta, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0)
    b = tl.load(b_ptr + at, mask=at < size, other=0.0)
    terms, slope, p = class_terms(a, b, beta, NAME)
    tl.store(out_ptr + at, terms, mask=at < size)
    tl.store(out_ptr + size + at, slope, mask=at < size)
    tl.store(out_ptr + 2 * size + at, p, mask=at < size)


def test_the_kernels_know_every_divergence() -> None:
    assert tuple(BY_NAME) == device_form.NAMES


@every_divergence
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_terms_are_the_torch_form_s(name: str, beta: float) -> None:
    logs = [0.0, -1e-6, -0.01, -0.7, -3.0, -20.0, -80.0, -120.0, -1e4, -1e10, -INF]
    a, b = columns(logs, logs)
    out = torch.full((3, len(a)), 7.0, device=DEVICE)
    terms_kernel[(1,)](on_device(a), on_device(b), out, len(a), beta, name, triton.next_power_of_2(len(a)))
    p, q = a.double().exp(), b.double().exp()
    # each class in a row of its own
    alone = BY_NAME[name](Classes(*(x.double()[:, None] for x in (a, b, p, q)), banned=True), beta)
    want = alone.value, alone.w[:, 0]
    # a logarithm is as large as p's own, or q's; exp errs by 4 + 2 |x| half ulps, and so does the logarithm of a sum of
    # them, absolutely. What underflows weighs nothing
    size = torch.stack([x * (1 + y.double().abs().clamp(max=1e4)) for x, y in ((p, a), (q, b))]).nan_to_num(0).sum(0)
    apart = (a.double() - b.double()).abs().nan_to_num(0, 0)
    bound = 64 * HALF_ULP * (size + (p + q) * (1 + (apart if name in device_form.UNMIXED else 0))) + 1e-30
    for got, exact in zip(out.cpu()[:2], want, strict=True):
        within(got, exact, bound)
    within(out[2].cpu(), p, 64 * HALF_ULP * size + 1e-37)


@pytest.mark.parametrize("at", [0, 1])
@every_divergence
def test_a_nan_shows_in_the_terms(name: str, at: int) -> None:
    both = [torch.tensor([-1.0]), torch.tensor([-2.0])]
    both[at] = torch.tensor([NAN])
    out = torch.zeros(3, 1, device=DEVICE)
    terms_kernel[(1,)](*map(on_device, both), out, 1, 0.5, name, 1)
    assert out[0].isnan()


@every_divergence
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.95])
def test_no_slope_is_larger_than_the_bound_says(name: str, beta: float) -> None:
    """Distributions of every kind: alike, one-sided, nearly disjoint."""
    g = torch.Generator().manual_seed(0)
    scores = (
        torch.randn(2, 400, 6, generator=g, dtype=torch.float64) * torch.tensor([0.1, 1, 5, 30]).repeat(100)[:, None]
    )
    a, b = scores.log_softmax(-1)
    value, w, total = BY_NAME[name](Classes(a, b, a.exp(), b.exp()), beta)
    gradient = w - a.exp() * total[:, None]
    bound = device_form.largest_slope(name, beta) + (2 * value[:, None] if name == "reverse" else 0)
    assert (gradient.abs() <= bound).all()


# --- the kernel over rows


class Case(NamedTuple):
    """float32 logits [n, V] and a teacher: its logits, or ids [n, K] with log-probs."""

    logits: Tensor
    teacher: Tensor | None = None
    ids: Tensor | None = None
    logps: Tensor | None = None
    config: LossConfig = LossConfig()
    teacher_config: LossConfig = LossConfig()


CONFIGS = [
    (LossConfig(), LossConfig()),
    (LossConfig(softcap=4.0, logit_scale=1.3, temperature=0.7), LossConfig(softcap=4.0, logit_scale=1.3)),
]


def random(*shape: int, seed: int) -> Tensor:
    return on_device(3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def listing(rows: int, vocabulary: int, count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Ids in any order, the first and the last of the vocabulary among them, every fifth unused."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:count] for _ in range(rows)])
    if count > 1:
        ids[0, :2] = torch.tensor([0, vocabulary - 1])
        ids[0, 2:] = torch.arange(1, count - 1)
    logps = torch.randn(rows, vocabulary, generator=g).log_softmax(1).gather(1, ids)
    return on_device(torch.where(torch.arange(count) % 5 == 4, -1, ids), torch.int64), on_device(logps)


def case_of(form: str, rows: int, vocabulary: int, count: int = 7, configs: Any = CONFIGS[0]) -> Case:
    logits = random(rows, vocabulary, seed=1)
    if form == "whole":
        return Case(logits, random(rows, vocabulary, seed=2), config=configs[0], teacher_config=configs[1])
    ids, logps = listing(rows, vocabulary, min(count, vocabulary))
    return Case(logits, None, ids, logps, configs[0], configs[0])


def problem_of(
    case: Case, name: str, coefficients: Tensor | None = None, grads: torch.dtype = torch.float32, cut: Launch = SMALL,
    **work: bool,
) -> DistillProblem:  # fmt: skip
    count = len(case.logits)
    tokens = torch.arange(count, device=DEVICE)
    given = torch.ones(count, device=DEVICE) if coefficients is None else on_device(coefficients)
    kind = distill._Kind(name, BETA, case.config.encoded, case.teacher_config.encoded)
    rows = Rows(tokens, torch.full((count,), NAN, device=DEVICE), given)
    problem = distill._problem(kind, case.logits, case.teacher, rows, grads, **{"gradient": True, **work})
    problem = replace(problem, launch=cut)
    if case.teacher is None:
        listed, k = distill._listed(Teacher(ids=case.ids, logps=case.logps), tokens, case.logits.shape[1])
        problem = replace(problem, listed=listed, count=k)
    return problem


def exact(case: Case, name: str, coefficients: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The divergences and the gradient of the logits, by autograd in float64, dense."""

    def scores(z: Tensor, config: LossConfig) -> Tensor:
        z = z.double().cpu() * config.logit_scale
        if config.softcap is not None:
            z = torch.where(z == -INF, z, config.softcap * torch.tanh(z / config.softcap))
        return z / config.temperature

    leaf = case.logits.detach().double().cpu().requires_grad_()
    a = scores(leaf, case.config).log_softmax(1)
    if case.teacher is not None:
        b = scores(case.teacher, case.teacher_config).log_softmax(1)
    else:
        a, b = listed_classes(a, case)
    value = of_classes(name, a, b)
    ones = torch.ones(len(value), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value, leaf, ones if coefficients is None else coefficients.double())
    return value.detach(), gradient


def listed_classes(a: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs of the listed ids and of the tail, row by row; unused places are classes that neither has."""
    assert case.ids is not None
    assert case.logps is not None
    out_a, out_b = [], []
    for row, ids, logps in zip(a, case.ids.cpu(), case.logps.double().cpu(), strict=True):
        used = ids >= 0
        others = [j for j in range(len(row)) if j not in ids.tolist()]
        tail = row[others].logsumexp(0) if others else torch.tensor(-INF).double()
        out_a.append(torch.cat([torch.where(used, row[ids], -INF), tail[None]]))
        left = torch.tensor(max(0.0, 1 - math.fsum(logps[used].exp().tolist()))).double().log()
        out_b.append(torch.cat([torch.where(used, logps, -INF), left[None]]))
    return torch.stack(out_a), torch.stack(out_b)


def of_classes(name: str, a: Tensor, b: Tensor) -> Tensor:
    def kl(x: Tensor, y: Tensor) -> Tensor:
        there = x > -INF
        return (torch.where(there, x, -1e3).exp() * torch.where(there, x - y, 0.0)).sum(1)

    m = torch.logaddexp(b + math.log(BETA), a + math.log1p(-BETA))
    return {
        "reverse": lambda: kl(a, b),
        "forward": lambda: kl(b, a),
        "jsd": lambda: BETA * kl(b, m) + (1 - BETA) * kl(a, m),
        "skew-forward": lambda: kl(b, m),
        "skew-reverse": lambda: kl(a, m),
    }[name]()


# scores of up to 15 are rounded by 15 half ulps, exp makes that their relative error; sums of up to 640, logarithms and
# differences of those as large as 20 double it a few times, and divergences and slopes are as large as 20
CLOSE = 40 * 20 * HALF_ULP


def launched(problem: DistillProblem, grads: Tensor) -> Tensor:
    """The scales; the divergences are in the problem."""
    scales = torch.full((len(problem.rows.token_ptr),), NAN, device=DEVICE)
    launch_distill(problem, grads, scales)
    return scales


def solved(problem: DistillProblem) -> tuple[Tensor, Tensor]:
    """The divergences and the gradient, made into rooms with guards."""
    grads = gapped(torch.full_like(problem.logits, NAN))
    launched(problem, grads)
    assert (behind(grads) == GUARD).all()
    return problem.rows.values_ptr.cpu(), grads.cpu()


def right(problem: DistillProblem, case: Case, name: str) -> None:
    values, grads = solved(problem)
    want, slope = exact(case, name)
    within(values, want, CLOSE * (1 + want))
    within(grads, slope, CLOSE * (1 + want[:, None]) * case.config.logit_scale / case.config.temperature)


# 7: less than a block. 128: one whole block. 300: two and a rest. 640: five
@every_divergence
@pytest.mark.parametrize("form", ["whole", "listed"])
@pytest.mark.parametrize(("softcap", "vocabulary"), [(False, 7), (True, 300)])
def test_divergence_and_gradient_are_float64_s(name: str, form: str, softcap: bool, vocabulary: int) -> None:
    case = case_of(form, 2, vocabulary, configs=CONFIGS[softcap])
    right(problem_of(case, name), case, name)


@pytest.mark.parametrize("form", ["whole", "listed"])
@pytest.mark.parametrize("vocabulary", [128, 640])
def test_rows_of_whole_blocks(form: str, vocabulary: int) -> None:
    case = case_of(form, 2, vocabulary)
    right(problem_of(case, "jsd"), case, "jsd")


@pytest.mark.parametrize(
    ("name", "count"), [("reverse", 0), ("forward", 0), ("forward", 1), ("reverse", 5), ("jsd", 40), ("reverse", 300)]
)
def test_any_number_of_listed_ids(name: str, count: int) -> None:
    """None: nothing is said. 40: more than the smallest tile. 300: the tail is what is unused."""
    case = case_of("listed", 3, 300, count)
    right(problem_of(case, name), case, name)
    if count == 0:
        assert not solved(problem_of(case, name))[1].any()


@pytest.mark.parametrize("name", ["forward", "jsd"])
def test_a_list_of_all_there_is_leaves_no_tail(name: str) -> None:
    logits, g = random(2, 130, seed=1), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(130, generator=g) for _ in range(2)])
    # in float64 they add up to 1 but for rounding, which the tail's share would otherwise be
    logps = torch.randn(2, 130, generator=g).log_softmax(1)
    case = Case(logits, None, on_device(ids, torch.int64), on_device(logps))
    problem = problem_of(case, name)
    problem.listed.tail_ptr.fill_(-INF)
    values, grads = solved(problem)
    whole = Case(logits, on_device(torch.zeros(2, 130).scatter(1, ids, logps)))
    want, slope = exact(whole, name)
    within(values, want, CLOSE * (1 + want))
    within(grads, slope, CLOSE)


@pytest.mark.parametrize("form", ["whole", "listed"])
@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_unaligned_rows_of_another_dtype(name: str, form: str) -> None:
    case = case_of(form, 3, 301)
    rounded = case._replace(
        logits=case.logits.bfloat16(), teacher=None if case.teacher is None else case.teacher.half()
    )
    problem = problem_of(rounded, name, grads=torch.float32)
    assert not problem.work.aligned
    grads = torch.full_like(case.logits, NAN)
    launched(problem, grads)
    want, slope = exact(rounded, name)
    within(problem.rows.values_ptr.cpu(), want, CLOSE * (1 + want))
    within(grads.cpu(), slope, CLOSE * (1 + want[:, None]))


@pytest.mark.parametrize("form", ["whole", "listed"])
@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_in_place_the_gradient_is_the_same_to_the_bit(name: str, form: str) -> None:
    case = case_of(form, 3, 300)
    _, apart = solved(problem_of(case, name))
    logits = case.logits.clone()
    launched(problem_of(case._replace(logits=logits), name), logits)
    assert torch.equal(logits.cpu(), apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["whole", "listed"])
@pytest.mark.parametrize("vocabulary", [7, 600])
def test_narrowed_gradients_equal_those_in_a_room_apart(form: str, vocabulary: int, dtype: torch.dtype) -> None:
    chunks = head_chunks(3, vocabulary, dtype)
    case = case_of(form, 3, vocabulary)
    room = chunks.rooms[0].logits
    logits = room[:3]
    logits.copy_(case.logits)
    narrow, apart = chunks.gradient_over(room)[:3], chunks.gradient_apart()[:3].fill_(NAN)
    assert narrow.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    rescaled = dtype == torch.float16
    given = torch.tensor([1.0, -2.0, 0.0])
    problem = problem_of(
        case._replace(logits=logits), "jsd", given, dtype, Launch(32, 8, 1), chunk=True, rescaled=rescaled
    )
    scales = launched(problem, apart)
    assert not apart.isnan().any()
    again = launched(replace(problem, work=problem.work._replace(narrowed=True)), narrow)
    assert torch.equal(narrow, apart)
    assert (narrow[2] == 0).all()
    assert torch.equal(scales, again) == rescaled


@pytest.mark.parametrize(("form", "name"), [*(("whole", name) for name in NAMES), ("listed", "reverse")])
def test_rescaled_rows_fill_float16_and_say_by_how_much(name: str, form: str) -> None:
    case = case_of(form, 6, 300, configs=CONFIGS[1])
    given = torch.tensor([1.0, -1.0, 3e4, 1e-30, -1e25, 0.0])
    grads = torch.full_like(case.logits, NAN, dtype=torch.float16)
    problem = problem_of(case, name, given, torch.float16, rescaled=True)
    scales = launched(problem, grads).double().cpu()
    assert torch.equal(scales.log2(), scales.log2().round())
    assert scales[5] == 2.0**120  # such a row never limits the scale of a sum
    values, want = exact(case, name, given)
    _, one = exact(case, name)
    error = CLOSE * (1 + values)[:, None] * given[:, None].abs() * problem.transform.slope
    bound = 1.1 * 2.0**-11 * want.abs() + 2.0**-24 / scales[:, None] + error.double()
    within(grads.double().cpu() / scales[:, None], want, bound)
    largest = device_form.largest_slope(name, BETA) + (2 * values if name == "reverse" else 0)
    largest = (largest * given.abs() * problem.transform.slope * scales)[:5]
    # values are float32's, so that the last digit may be another at a power of two
    assert (largest <= 2.0**14 * (1 + 1e-5)).all()
    assert (largest >= 2.0**13 * (1 - 1e-5)).all()
    assert one.any()


@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("form", ["whole", "listed"])
def test_rows_are_those_of_their_tokens(chunk: bool, form: str) -> None:
    """Of tokens 4 and 1 of six. In a chunk they are rows 0 and 1; else nobody else's row is read or written."""
    case, tokens = case_of(form, 6, 300), torch.tensor([4, 1], device=DEVICE)
    given = torch.arange(6.0) + 1
    want, slope = exact(case, "reverse", given)
    problem = problem_of(case, "reverse", given, chunk=chunk)
    values = problem.rows.values_ptr
    problem = replace(problem, rows=problem.rows._replace(token_ptr=tokens))
    kept = tokens if chunk else torch.arange(6, device=DEVICE)
    if not chunk:
        for x in (case.logits, case.teacher):
            if x is not None:
                x[torch.tensor([0, 2, 3, 5])] = NAN
    if form == "listed":
        assert case.ids is not None
        listed, _ = distill._listed(Teacher(ids=case.ids, logps=case.logps), tokens, 300)
        problem = replace(problem, listed=listed)
    beside = case.teacher[kept] if case.teacher is not None else problem.teacher
    problem = replace(problem, logits=case.logits[kept], teacher=beside)
    grads = torch.full_like(problem.logits, GUARD)
    launched(problem, grads)
    written = values.isfinite().nonzero().squeeze(1).tolist()
    assert written == [1, 4]
    within(values.cpu()[[4, 1]], want[[4, 1]], CLOSE * (1 + want[[4, 1]]))
    mine = grads if chunk else grads[tokens]
    within(mine.cpu(), slope[[4, 1]], 5 * CLOSE * (1 + want[[4, 1], None]))
    if not chunk:
        assert (grads[torch.tensor([0, 2, 3, 5])] == GUARD).all()


@every_divergence
def test_tokens_that_one_side_cannot_have(name: str) -> None:
    """In any block and lane; underflowing or not."""
    logits, teacher = random(6, 300, seed=1), random(6, 300, seed=2)
    logits[0, 1] = teacher[1, 290] = -INF
    logits[2, :5], teacher[2, 5:] = -INF, -INF  # nothing in common
    logits[3, 140] = teacher[3, 140] = -INF
    logits[4, 7], teacher[4, 7] = -500.0, -INF  # its probability underflows
    logits[5, :128] = teacher[5, :128] = -INF  # a whole block
    infinite = {"reverse": [False, True, True, False, True, False], "forward": [True, False, True] + [False] * 3}
    expected = infinite.get(name, [False] * 6)
    case = Case(logits, teacher)
    values, grads = solved(problem_of(case, name))
    assert (values == INF).tolist() == expected
    finite = torch.tensor([not x for x in expected])
    assert values[finite].isfinite().all()
    assert grads.isfinite().all()
    assert not grads[~finite].any()
    assert not grads[(logits == -INF).cpu()].any()
    if name not in infinite:
        return
    # the row's own numbers, by the classes that either can have
    there = ((logits > -INF) & (teacher > -INF)).cpu()[3]
    want, slope = exact(Case(logits[3:4, there], teacher[3:4, there]), name)
    within(values[3:4], want, CLOSE * (1 + want))
    within(grads[3:4, there], slope, CLOSE * (1 + want))


@every_divergence
def test_listed_ids_that_one_side_cannot_have(name: str) -> None:
    """Row 0: the teacher is sure of one, never says the other. Row 1: the student cannot have the first. Row 2: it can
    have nothing but what is listed."""
    logits = random(3, 300, seed=1)
    logits[1, 0] = -INF
    logits[2, 2:] = -INF
    ids = torch.tensor([[0, 299], [0, 299], [0, 1]])
    logps = torch.tensor([[0.0, -INF], [-0.5, -2.0], [-0.5, -2.0]])
    values, grads = solved(problem_of(Case(logits, None, on_device(ids, torch.int64), on_device(logps)), name))
    # the tail of row 2 is a class that only the teacher has
    expected = {"reverse": [True, False, False], "forward": [False, True, True]}.get(name, [False] * 3)
    assert (values == INF).tolist() == expected
    assert not values.isnan().any()
    assert grads.isfinite().all()
    assert not grads[torch.tensor(expected)].any()
    assert not grads[(logits == -INF).cpu()].any()


@pytest.mark.parametrize("where", ["student", "teacher", "listed", "tail"])
@pytest.mark.parametrize("name", ["forward", "skew-reverse"])
def test_a_nan_logit_shows_in_everything_of_its_row(name: str, where: str) -> None:
    case = case_of("whole" if where in ("student", "teacher") else "listed", 2, 300)
    column = 2 if where == "tail" else 0
    broken = case.teacher if where == "teacher" else case.logits
    assert broken is not None
    if where == "listed":
        assert case.ids is not None
        column = int(case.ids[1, 0])
    if where == "tail":
        assert case.ids is not None
        column = next(j for j in range(300) if j not in case.ids[1].tolist())
    broken[1, column] = NAN
    values, grads = solved(problem_of(case, name))
    assert values[0].isfinite()
    assert values[1].isnan()
    assert grads[0].isfinite().all()
    assert grads[1].isnan().any()


def test_a_tail_of_nearly_nothing_keeps_its_relative_accuracy() -> None:
    """1 - p of the listed ids would have no digit left of it."""
    logits = torch.full((1, 300), -20.0)
    logits[0, 40] = 10.0
    case = Case(on_device(logits), None, on_device([[40]], torch.int64), on_device([[math.log1p(-1e-6)]]))
    for name in ("forward", "reverse"):
        values, _ = solved(problem_of(case, name))
        want, _ = exact(case, name)
        # the student's own rounding: 30 half ulps of a log-prob of the tail, times what it weighs, 1e-6; and of the
        # other class, which it weighs with 1, half an ulp of its log-prob of 1e-6
        within(values, want, 1e-6 * 64 * HALF_ULP * 30)


def test_a_second_run_is_the_same_to_the_bit() -> None:
    for form in ("whole", "listed"):
        first, again = (solved(problem_of(case_of(form, 3, 300), "jsd")) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_gradient_nothing_is_written_but_the_divergence() -> None:
    case = case_of("listed", 3, 300)
    problem = problem_of(case, "reverse", gradient=False)
    grads = torch.full_like(case.logits, GUARD)
    launched(problem, grads)
    assert (grads == GUARD).all()
    assert problem.rows.values_ptr.isfinite().all()
