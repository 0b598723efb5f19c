"""The kernels as operators: what `torch.library` and `torch.compile` ask of them, and what never waits for a device."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from prefixloss import LossConfig, TokenAdvantages, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss._kernels import problem, rows
from prefixloss.backends.memory import chunk_rows
from prefixloss.backends.triton import chunks, from_head, from_logits, scaling
from prefixloss.backends.triton.chunks import Wanted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, D, V = 2, 5, 8, 37
N = B * T


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


PADDED = ids(B, T)
FLAGS = torch.tensor([0, 1, 3, 3, 0, 3, 3, 1, 0, 3], dtype=torch.uint8, device=DEVICE)
OPTIONS = LossConfig(entropy_coef=0.1, kl="k3", kl_coef=0.2, temperature=1.5).encoded
PLAIN = LossConfig(chunk_tokens=4).encoded
HEAD_OF_NONE = (None, None, None)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).requires_grad_()


def statistics(options: str) -> Tensor:
    return from_logits.logit_statistics(random(B, T, V), None, ids(N), FLAGS, options)


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments."""
    given, factor = random(5, N), torch.tensor(1.5, device=DEVICE)
    # a positive loss, the sum of positive losses: `opcheck` differentiates its absolute value and then looks at the
    # outputs again, and the backward multiplies the gradients among them by the sign, in place
    given[0], given[1] = -given[0].abs(), given[1].abs()
    head, both = (leaf(N, D), leaf(V, D, seed=2), leaf(V, seed=3)), [True, True, True]
    frozen, hidden_alone = (leaf(N, D), random(V, D, seed=2), None), [True, False, False]
    tokens, flags = ids(N), FLAGS
    coefficients = random(3, N, seed=4) * (flags != 0)
    return {
        "logit_loss": (from_logits.logit_loss, (leaf(B, T, V), None, tokens, flags, given, True, OPTIONS, True)),
        "logit_loss without gradient": (
            from_logits.logit_loss, (random(B, T, V), None, tokens, flags, given, True, OPTIONS, False)
        ),
        "logit_loss_": (from_logits.logit_loss_, (random(N, V), None, tokens, flags, given, True, OPTIONS)),
        "logit_statistics": (from_logits.logit_statistics, (leaf(B, T, V), None, tokens, flags, OPTIONS)),
        "logit_gradient": (
            from_logits.logit_gradient,
            (random(B, T, V), None, tokens, flags, statistics(OPTIONS), coefficients, OPTIONS),
        ),
        "logit_gradient_": (
            from_logits.logit_gradient_,
            (random(B, T, V), None, tokens, flags, statistics(OPTIONS), coefficients, OPTIONS),
        ),
        "linear_loss": (
            from_head.linear_loss, (*head, *HEAD_OF_NONE, tokens, flags, given, [True] * 3, PLAIN, -1, both)
        ),
        "linear_loss, bounded": (
            from_head.linear_loss,
            (*frozen, *HEAD_OF_NONE, tokens, flags, given, [True] * 3, PLAIN, 8, hidden_alone),
        ),
        "linear_statistics": (
            from_head.linear_statistics, (*head, *HEAD_OF_NONE, tokens, flags, OPTIONS, -1, False, None)
        ),
        "linear_statistics, slope": (
            from_head.linear_statistics, (*frozen, *HEAD_OF_NONE, tokens, flags, PLAIN, 8, True, None)
        ),
        "linear_gradient": (
            from_head.linear_gradient,
            (*(x.detach() for x in head), *HEAD_OF_NONE, tokens, flags, statistics(OPTIONS), coefficients, OPTIONS,
             -1, both),
        ),
        "scale_": (scaling.scale_, (random(N, V), factor)),
    }  # fmt: skip


NAMES = (
    "logit_loss", "logit_loss without gradient", "logit_loss_", "logit_statistics", "logit_gradient",
    "logit_gradient_", "linear_loss", "linear_loss, bounded", "linear_statistics", "linear_statistics, slope",
    "linear_gradient", "scale_",
)  # fmt: skip


def test_every_operator_is_called() -> None:
    modules = (from_head, from_logits, scaling)
    registered = {
        found._name for module in modules for found in vars(module).values() if isinstance(found, CustomOpDef)
    }
    assert {operator._name for operator, _ in calls().values()} == registered
    assert set(NAMES) == set(calls())


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_they_say(name: str) -> None:
    """Schema, fake implementation, autograd registration, and the same under compilation."""
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


# --- whole calls, compiled


OLD = random(B, T, seed=6, scale=0.1) - math.log(V)
ADVANTAGES = random(B, T, seed=7)
BONUS = LossConfig(entropy_coef=0.01)
SEQUENCE = LossConfig(reduction="seq-mean-token-mean", kl="k3", kl_coef=0.1, ratio_level="sequence")


def fused(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return linear_prefix_loss(
        hidden * 1, weight, PADDED, ADVANTAGES, old_logps=OLD, config=BONUS, backend="triton"
    ).loss


def of_logits(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return prefix_loss(logits * 1, PADDED, ADVANTAGES, old_logps=OLD, config=BONUS, backend="triton").loss


def in_place(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return prefix_loss(logits * 1, PADDED, ADVANTAGES, old_logps=OLD, backend="triton", inplace=True).loss


def two_stages(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    advantages = TokenAdvantages(*(torch.tensor(v, device=DEVICE) for v in ([1.0, 0.5], [-1.0, -0.5], [2, 3])))
    out = prefix_loss(logits * 1, PADDED, advantages, old_logps=OLD, ref_logps=OLD, config=SEQUENCE, backend="triton")
    return out.loss + 0 * out.metrics["entropy"]


def log_probs(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    out = linear_logps(hidden * 1, weight, PADDED, entropy=True, backend="triton", temperature=0.7)
    return (out.logps * out.entropy).sum()


def frozen_head(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    return linear_logps(hidden * 1, weight.detach(), PADDED, backend="triton").logps.square().sum()


@pytest.mark.parametrize("function", [fused, of_logits, in_place, two_stages, log_probs, frozen_head])
def test_a_compiled_call_has_no_graph_break_and_the_same_gradient(function: Callable[..., Tensor]) -> None:
    results = []
    torch._dynamo.reset()
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = leaf(B, T, D), leaf(V, D, seed=2), leaf(B, T, V, seed=3)
        loss = call(*leaves)
        (1.3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
    assert len(results[0]) > 1
    # the same kernels in the same order
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- waiting for the device


LAUNCH = "a kernel, interpreted"


class Waits:
    """Counts what makes the host wait for a tensor's values, inside operators too.

    By the profiler, which also sees boolean indexing. Replacing `Tensor.__getitem__` would not do: when it is put back,
    Python keeps taking every tensor for a sequence, and `torch.tensor([a 0-d tensor])` fails from then on.
    """

    EVENTS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::_unique2")
    UNSEEN = ("tolist", "cpu", "numpy")  # of CPU tensors they leave no event

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.launching = False
        for name in self.UNSEEN:
            monkeypatch.setattr(Tensor, name, self.counted(getattr(Tensor, name)))

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += not self.launching
            return method(*args, **kwargs)

        return call

    def of(self, call: Callable[[], Any]) -> int:
        self.count = 0
        with launches_marked(self), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        return self.count + sum(e.name in self.EVENTS and not within_launch(e) for e in seen.events())


def within_launch(event: Any) -> bool:
    while event is not None and event.name != LAUNCH:
        event = event.cpu_parent
    return event is not None


@contextmanager
def launches_marked(waits: Waits) -> Iterator[None]:
    """The interpreter copies tensors and looks into them at each launch; a device does not."""

    def marked(launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            waits.launching = True
            with torch.profiler.record_function(LAUNCH):
                launch(*args, **kwargs)
            waits.launching = False

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("launch_rows", "launch_slices", "launch_combine", "launch_gradient"):
            patch.setattr(rows, name, marked(getattr(rows, name)))
        for module in (scaling, chunks):
            patch.setattr(module, "launch_scale", marked(module.launch_scale))
        yield


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """As on an accelerator, where arguments' values are not looked at."""
    monkeypatch.setattr("prefixloss.check.readable", lambda *_: False)
    return Waits(monkeypatch)


@pytest.mark.parametrize(
    "config", [LossConfig(), BONUS, LossConfig(stats="scored"), LossConfig(reduction="none")], ids=repr
)
def test_counting_tokens_waits_once_at_most_and_not_at_all_with_their_number(config: LossConfig, waits: Waits) -> None:
    def call(**more: Any) -> None:
        leaves = leaf(B, T, D), leaf(V, D, seed=2)
        arguments = {"mask": ADVANTAGES > -0.5, "old_logps": OLD, "config": config, "backend": "triton", **more}
        loss = linear_prefix_loss(*leaves, PADDED, ADVANTAGES, **arguments).loss
        loss.sum().backward()

    # in two stages the backward, too, counts the tokens that have a gradient
    assert waits.of(call) == (2 if config.reduction == "none" else 1)
    assert waits.of(lambda: call(max_learning_tokens=N)) == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("config", [BONUS, SEQUENCE], ids=["one pass", "two stages"])
def test_nothing_waits_from_logits(config: LossConfig, inplace: bool, waits: Waits) -> None:
    def call() -> None:
        leaves = leaf(B, T, V)
        arguments = {"old_logps": OLD, "ref_logps": OLD, "config": config, "backend": "triton", "inplace": inplace}
        prefix_loss(leaves, PADDED, ADVANTAGES, **arguments).loss.backward()

    assert waits.of(call) == 0


def test_the_count_of_waits_can_fail(waits: Waits) -> None:
    assert waits.of(lambda: ADVANTAGES.sum().item()) == 1
    assert waits.of(lambda: (ADVANTAGES > 0).nonzero()) == 1
    assert waits.of(lambda: ADVANTAGES.tolist()) == 1
    assert waits.of(lambda: ADVANTAGES[ADVANTAGES > 0]) == 1
    assert waits.of(lambda: bool(ADVANTAGES.any())) == 1


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_bound_that_is_too_small_is_never_silent(reduction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> Tensor:
        config = LossConfig(reduction=reduction)
        leaves = leaf(B, T, D), leaf(V, D, seed=2)
        return linear_prefix_loss(
            *leaves, PADDED, ADVANTAGES, config=config, backend="triton", max_learning_tokens=3
        ).loss

    monkeypatch.setenv("PREFIXLOSS_CHECK", "1")
    with pytest.raises(ValueError, match=r"max_learning_tokens.*3"):
        call()
    monkeypatch.setattr("prefixloss.check.readable", lambda *_: False)
    assert call().isnan().any()


# --- small pieces


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(objective="cispo", clip_high=4.0, kl="full", kl_coef=1e-30, stats="scored", chunk_tokens=7),
        LossConfig(sampler_correction="icepop", sampler_bounds=(0.0, math.inf), sapo_tau=(1 / 3, 1.05), softcap=30),
        LossConfig(reduction="constant", max_length=9, ratio_cap=3.0, dual_clip=2.0, row_tolerance=1e-7),
    ],
    ids=repr,
)
def test_options_survive_as_text(config: LossConfig) -> None:
    assert LossConfig.decoded(config.encoded) == config


def test_options_that_warn_do_so_once() -> None:
    with pytest.warns(UserWarning, match="kl_coef"):
        config = LossConfig(kl_coef=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        linear_prefix_loss(leaf(B, T, D), leaf(V, D), PADDED, ADVANTAGES, config=config, backend="triton")


def test_chunks_are_whole_tiles_of_equal_size_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(2**20))
    device = torch.device("cpu")
    for tokens in (1, 15, 16, 100, 1000, 12_345):
        size = chunk_rows(tokens, tokens, 1024, device, None)
        assert 1 <= size <= 1024  # a budget of 2^20 bytes
        assert size % 16 == 0
        count = math.ceil(tokens / size)
        assert count * size - tokens < 16 * count or size % 128 == 0
    assert chunk_rows(0, 5, 1024, device, None) == 0
    assert chunk_rows(10, 10, 1024, device, 3) == 3


def test_rows_are_found_with_and_without_their_number() -> None:
    wanted = torch.tensor([False, True, False, True, True])
    exact, bounded, all_of_them = (Wanted.where(wanted, most) for most in (None, 4, 9))
    assert exact.token.tolist() == [1, 3, 4]
    assert exact.wanted is None
    assert bounded.token.tolist() == [1, 3, 4, 0]
    assert bounded.wanted is not None
    assert bounded.wanted.tolist() == [True, True, True, False]
    assert all_of_them.token.tolist() == [0, 1, 2, 3, 4]
    assert all_of_them.wanted is wanted
    learning, others = Wanted.split(torch.tensor([False, True, False, False, True]), wanted)
    assert learning.token.tolist() == [1, 4]
    assert others.token.tolist() == [3]


def test_flags_are_the_kernels_own() -> None:
    assert from_head.LEARNING == problem.LEARNING.value == 2
    assert problem.COMPUTED.value == 1
