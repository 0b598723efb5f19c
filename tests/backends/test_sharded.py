"""A vocabulary split over processes gives what one process gives: every option, uneven parts, padding, exact bits on
all ranks."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import group_of, in_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prefixloss import LossConfig, LossOutput, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import products
from prefixloss.maths.objectives import View

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")

B, T, D, V = 3, 4, 5, 11
# columns of each rank; 13 are 2 of padding behind the vocabulary; the last of three may hold nothing else
SPLITS = [(6, 5), (1, 10), (4, 4, 3), (7, 6), (5, 6, 2)]


def own(logp: Tensor, given: View) -> Tensor:
    """A loss that no kernel knows."""
    return -given.advantages * given.ratio.sigmoid()


CONFIGS = [
    LossConfig(),
    LossConfig(objective="cispo", clip_high=3.0, entropy_coef=0.1, temperature=0.7),
    LossConfig(kl="full", kl_coef=0.3, kl_importance=True, stats="scored"),
    LossConfig(kl="full", kl_coef=0.3, entropy_coef=0.2, softcap=2.0, logit_scale=1.5, temperature=1.3),
    LossConfig(ratio_level="sequence", reduction="seq-mean-token-mean", kl="k3", kl_coef=0.1),
    LossConfig(reduction="none", entropy_coef=0.1, softcap=3.0),
    LossConfig(row_tolerance=1e-9, entropy_coef=0.1),
    LossConfig(objective=own, kl="k3", kl_coef=0.1, entropy_coef=0.1),
]


def tensor(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole: the head and its bias, the reference's, and logits; a banned token, and one that is nearly certain."""
    given = {
        "hidden": tensor(B, T, D, seed=0), "weight": tensor(V, D, seed=1), "bias": tensor(V, seed=2),
        "ref_hidden": tensor(B, T, D, seed=3), "ref_weight": tensor(V, D, seed=4), "ref_bias": tensor(V, seed=5),
        "logits": tensor(B, T, V, seed=6, scale=2.0), "ref_logits": tensor(B, T, V, seed=7),
    }  # fmt: skip
    given["bias"][3] = -math.inf
    given["logits"][..., 9] = -math.inf
    given["logits"][0, 0, 2] = 40.0
    return {name: x.to(dtype) for name, x in given.items()}


TOKENS = torch.tensor([[2, 0, 10, 5], [7, 6, 1, 4], [8, 10, 0, 2]])
ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, -0.5, 1.0], [0.3, -0.3, 0.0, 1.0]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)


def given_of(dtype: torch.dtype, config: LossConfig) -> dict[str, Any]:
    old = tensor(B, T, seed=8, scale=0.2).to(dtype) - 2.0
    return {"mask": MASK, "old_logps": old, "ref_logps": old + 0.1, "config": config, "normalizer": 3.0}


def run_linear(x: dict[str, Tensor], config: LossConfig, **more: Any) -> tuple[LossOutput, dict[str, Tensor]]:
    leaves = {name: x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    given = given_of(x["hidden"].dtype, config)
    if config.kl == "full":
        del given["ref_logps"]
        given |= {"ref_hidden": x["ref_hidden"], "ref_lm_head_weight": x["ref_weight"]}
        given["ref_lm_head_bias"] = x["ref_bias"]
    out = linear_prefix_loss(
        leaves["hidden"], leaves["weight"], TOKENS, ADVANTAGES.to(x["hidden"].dtype), lm_head_bias=leaves["bias"],
        **given, **more,
    )  # fmt: skip
    out.loss.sum().backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run_logits(x: dict[str, Tensor], config: LossConfig, **more: Any) -> tuple[LossOutput, dict[str, Tensor]]:
    leaf = x["logits"].clone().requires_grad_()
    given = given_of(leaf.dtype, config)
    if config.kl == "full":
        given["ref_logits"] = x["ref_logits"]
    out = prefix_loss(leaf, TOKENS, ADVANTAGES.to(leaf.dtype), **given, **more)
    out.loss.sum().backward()
    assert leaf.grad is not None
    return out, {"logits": leaf.grad}


def run_logps(
    x: dict[str, Tensor], config: LossConfig, frozen: bool = False, **more: Any
) -> tuple[Any, dict[str, Tensor]]:
    hidden = x["hidden"].clone().requires_grad_()
    weight = x["weight"].clone().requires_grad_(not frozen)
    options = {"temperature": config.temperature, "softcap": config.softcap, "logit_scale": config.logit_scale}
    entropy = not frozen and config.entropy_coef != 0
    out = linear_logps(hidden, weight, TOKENS, mask=MASK, entropy=entropy, **options, **more)
    total = (out.logps * ADVANTAGES).sum()
    (total if out.entropy is None else total + 0.7 * out.entropy.sum()).backward()
    return out, {"hidden": hidden.grad} | ({} if frozen else {"weight": weight.grad})


CALLS: dict[str, Callable[..., tuple[Any, dict[str, Tensor]]]] = {
    "linear": run_linear,
    "logits": run_logits,
    "in place": partial(run_logits, inplace=True),
    "logps": run_logps,
    "frozen": partial(run_logps, frozen=True),
}
SPLIT = ("weight", "bias", "ref_weight", "ref_bias", "logits", "ref_logits")


def cut(x: dict[str, Tensor], counts: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """This rank's columns; what lies behind the vocabulary is padding that would show."""
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    parts = dict(x)
    for name in SPLIT:
        axis = -1 if "logits" in name else 0
        padded = torch.cat([x[name], torch.full_like(x[name].narrow(axis, 0, 2), 1e4)], axis)
        parts[name] = padded.narrow(axis, start, stop - start).contiguous()
    return parts


def results(out: Any) -> list[Tensor]:
    if isinstance(out, LossOutput):
        fields = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
        return [*(x.double() for x in fields.pop("metrics").values()), *(x.double() for x in fields.values())]
    return [x.double() for x in out if x is not None]


def compare(rank: int, size: int, file: str, counts: tuple[int, ...]) -> None:
    """One process of the group: every call against the same one on the whole vocabulary."""
    with group_of(rank, size, file) as group:
        more = {"tp_group": group, "vocab_size": V} if sum(counts) > V else {"tp_group": group}
        for dtype, error in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            whole = inputs(dtype)
            mine = cut(whole, counts, rank)
            for config in CONFIGS:
                for name, call in CALLS.items():
                    note = f"{name}, {dtype}, {config}, {counts}"
                    want, want_grads = call(whole, config, backend="torch")
                    got, grads = call(mine, config, **more)
                    for a, b in zip(results(got), results(want), strict=True):
                        torch.testing.assert_close(a, b, rtol=error, atol=error, msg=lambda m, n=note: f"{n}: {m}")
                    check_gradients(grads, want_grads, counts, rank, error, note)
                    check_same_bits(results(got))


def check_gradients(
    grads: dict[str, Tensor], want: dict[str, Tensor], counts: tuple[int, ...], rank: int, error: float, note: str
) -> None:
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    assert grads.keys() == want.keys(), note
    for name, grad in grads.items():
        expected = want[name]
        if name in SPLIT:
            axis = -1 if name == "logits" else 0
            padding = torch.zeros_like(expected.narrow(axis, 0, 2))
            expected = torch.cat([expected, padding], axis).narrow(axis, start, stop - start)
        torch.testing.assert_close(grad, expected, rtol=error, atol=error, msg=lambda m, n=name: f"{note}, {n}: {m}")


def check_same_bits(values: list[Tensor]) -> None:
    mine = torch.cat([x.reshape(-1) for x in values])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others)


@pytest.mark.parametrize("counts", SPLITS, ids=str)
def test_a_split_vocabulary_gives_the_same_loss_and_gradients(counts: tuple[int, ...], tmp_path: Path) -> None:
    in_processes(compare, len(counts), tmp_path, counts)


def by_kernels(rank: int, size: int, file: str, counts: tuple[int, ...], calls: list[tuple[str, int]]) -> None:
    """The kernels on this rank's columns, in several chunks, against the plain formula in float64 on all of them.

    calls: names with the index of a configuration.
    """
    os.environ["PREFIXLOSS_MEMORY"] = str(500 + 3000 * rank)  # the ranks agree on the smallest
    with group_of(rank, size, file) as group:
        more = {"tp_group": group, "backend": "triton"} | ({"vocab_size": V} if sum(counts) > V else {})
        exact, whole = inputs(torch.float64), inputs(torch.float32)
        error = 2e-5  # float32 sums of 5 products and 11 exponentials
        if len(counts) == 3:  # not a power of two: what fills up the slices is no score of 0, far above these
            for name in ("bias", "ref_bias"):
                exact[name] -= 128
                whole[name] = exact[name].float()
            error = 1e-4  # logits near -128 are rounded to 2^-17, and biases as well
        mine = cut(whole, counts, rank)
        for name, index in calls:
            config = CONFIGS[index]
            note = f"{name}, {config}, {counts}"
            want, want_grads = CALLS[name](exact, config, backend="reference")
            got, grads = CALLS[name](mine, config, **more)
            for a, b in zip(results(got), results(want), strict=True):
                torch.testing.assert_close(a, b, rtol=error, atol=error, msg=lambda m, n=note: f"{n}: {m}")
            check_gradients({n: g.double() for n, g in grads.items()}, want_grads, counts, rank, error, note)
            check_same_bits([*results(got), grads["hidden"].double()])


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels on CPU tensors run in the interpreter"
)


@INTERPRETED
@pytest.mark.parametrize(
    ("counts", "calls"),
    [
        ((6, 5), [("linear", 1), ("linear", 4), ("linear", 7), ("logps", 3), ("frozen", 0)]),
        ((5, 6, 2), [("linear", 2)]),
        pytest.param((4, 4, 3, 2), [("linear", 2)], marks=pytest.mark.slow),
        pytest.param(
            (6, 5), list(itertools.product(("linear", "logps", "frozen"), range(len(CONFIGS)))), marks=pytest.mark.slow
        ),
    ],
    ids=["two", "three", "four", "all"],
)
def test_the_kernels_on_a_split_vocabulary_give_the_plain_formula(
    counts: tuple[int, ...], calls: list[tuple[str, int]], tmp_path: Path
) -> None:
    in_processes(by_kernels, len(counts), tmp_path, counts, calls)


def by_machine_code(rank: int, size: int, file: str, counts: tuple[int, ...], calls: list[tuple[str, int]]) -> None:
    from ptx_emulator import Emulator  # noqa: PLC0415 (in this process alone)

    from prefixloss import door  # noqa: PLC0415

    emulator = Emulator()
    emulator.install()
    door._interpreted = lambda: True
    by_kernels(rank, size, file, counts, calls)
    assert not emulator.figures.errors
    assert set(emulator.figures.launches) >= {"slice_kernel", "combine_kernel", "gradient_kernel"}


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("counts", [(6, 5), (4, 4, 3, 2)], ids=["two", "four"])
def test_the_kernels_on_a_split_vocabulary_pass_as_machine_code(
    counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    calls = [("linear", 2), ("linear", 4), ("logps", 3), ("frozen", 0)]
    in_processes(by_machine_code, len(counts), tmp_path, counts, calls, method="spawn")


class Told:
    """A collective on its way, that says when it is waited for."""

    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self.work, self.name, self.events = work, name, events

    def wait(self) -> None:
        self.events.append(f"have {self.name}")
        self.work.wait()


def collectives(rank: int, size: int, file: str) -> None:
    """What a loss in three chunks does, in its order: sums and gradients by their chunk and size."""
    events: list[str] = []
    begun: dict[int, int] = {}
    reduce, logits, head = dist.all_reduce, products.logits, products.add_head_gradient

    def all_reduce(x: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if not async_op:
            return reduce(x, group=group)
        kind = "gradient" if x.dim() == 2 else "sums"
        begun[x.dim()] = begun.get(x.dim(), -1) + 1
        events.append(f"send {kind} {begun[x.dim()]}: {x.numel()} numbers")
        return Told(reduce(x, group=group, async_op=True), f"{kind} {begun[x.dim()]}", events)

    def say(name: str, product: Callable[..., None]) -> Callable[..., None]:
        return lambda *given, **more: events.append(name) or product(*given, **more)

    with group_of(rank, size, file) as group:
        dist.all_reduce = all_reduce
        products.logits, products.add_head_gradient = say("logits", logits), say("head", head)
        mine = cut(inputs(torch.float32), (6, 5), rank)
        hidden, weight = (mine[name].requires_grad_() for name in ("hidden", "weight"))
        # 8 of 12 tokens learn: no others are multiplied, or talked about
        linear_prefix_loss(
            hidden, weight, TOKENS, ADVANTAGES, mask=MASK, config=LossConfig(chunk_tokens=3), tp_group=group,
            backend="triton",
        ).loss.backward()  # fmt: skip
        dist.all_reduce = reduce
    sums, gradients = 2 * 8, D
    assert events == [
        "logits", f"send sums 0: {3 * sums} numbers",
        "logits", f"send sums 1: {3 * sums} numbers",
        "have sums 0", f"send gradient 0: {3 * gradients} numbers", "head",
        "logits", f"send sums 2: {2 * sums} numbers",
        "have sums 1", "have gradient 0", f"send gradient 1: {3 * gradients} numbers", "head",
        "have sums 2", "have gradient 1", f"send gradient 2: {2 * gradients} numbers", "head",
        "have gradient 2",
    ]  # fmt: skip


@INTERPRETED
def test_two_all_reduces_a_chunk_of_its_computed_tokens_go_on_while_products_are_made(tmp_path: Path) -> None:
    in_processes(collectives, 2, tmp_path)


def near_certainty(rank: int, size: int, file: str, counts: tuple[int, ...]) -> None:
    with group_of(rank, size, file) as group:
        for gap in (20.0, 60.0, 85.0):
            logits = torch.zeros(1, 1, sum(counts))
            logits[..., 1] = gap
            mine = logits.split(counts, -1)[rank].clone().requires_grad_()
            out = prefix_loss(mine, torch.ones(1, 1, dtype=torch.int64), torch.ones(1), tp_group=group)
            out.loss.backward()
            odds = (sum(counts) - 1) * math.exp(-gap)
            assert out.logps.item() == pytest.approx(-odds, rel=1e-6)
            if rank == 0:
                assert mine.grad is not None
                assert mine.grad[0, 0, 1].item() == pytest.approx(-odds, rel=1e-6)
        several_chunks = LossConfig(chunk_tokens=2)
        x = inputs(torch.float64)
        want = run_linear(x, several_chunks, backend="torch")[0].loss
        os.environ["PREFIXLOSS_MEMORY"] = str(200 + 700 * rank)  # the ranks agree on the smallest
        for config in (several_chunks, LossConfig()):
            got = run_linear(cut(x, (6, 5), rank), config, tp_group=group)[0].loss
            assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_log_probs_near_0_keep_their_digits_and_chunks_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    in_processes(near_certainty, 2, tmp_path, (6, 5))


def far_apart(rank: int, size: int, file: str) -> None:
    """float32, where exp(89) overflows: scores far from the largest, here and elsewhere."""
    with group_of(rank, size, file) as group:
        logits = torch.zeros(1, 1, 6)
        logits[..., 3:] = -200
        reference = torch.zeros(1, 1, 6)
        reference[..., 4] = -math.inf  # where the policy's probability is 0 as well
        full = LossConfig(kl="full", kl_coef=0.1, entropy_coef=0.1)
        for token, config in itertools.product((1, 3), (LossConfig(), full)):
            given = {"tokens": torch.tensor([[token]]), "advantages": torch.ones(1), "config": config}
            want, got = logits.clone().requires_grad_(), logits.split(3, -1)[rank].clone().requires_grad_()
            references = (reference, reference.split(3, -1)[rank]) if config.kl else (None, None)
            one = prefix_loss(want, **given, ref_logits=references[0], backend="torch")
            two = prefix_loss(got, **given, ref_logits=references[1], tp_group=group)
            assert one.logps.item() == pytest.approx(-math.log(3) - 200 * (token == 3))
            for a, b in zip(results(two), results(one), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            one.loss.backward()
            two.loss.backward()
            assert want.grad is not None
            torch.testing.assert_close(got.grad, want.grad.split(3, -1)[rank], rtol=1e-6, atol=1e-6)


def test_log_probs_far_below_0_are_finite_and_so_is_the_kl_of_what_has_no_probability(tmp_path: Path) -> None:
    in_processes(far_apart, 2, tmp_path)


def half_precision(rank: int, size: int, file: str, backend: str, count: int) -> None:
    with group_of(rank, size, file) as group:
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 32, generator=g).bfloat16() for n in (count, 400))
        tokens, advantages = torch.randint(400, (count,), generator=g), torch.randn(count, generator=g)
        exact = hidden.double().requires_grad_()
        linear_prefix_loss(exact, weight.double(), tokens, advantages, backend="torch").loss.backward()
        got = hidden.clone().requires_grad_()
        mine = weight.split(200)[rank].clone().requires_grad_()
        linear_prefix_loss(got, mine, tokens, advantages, tp_group=group, backend=backend).loss.backward()
        assert exact.grad is not None
        # one rounding to bfloat16: half a unit in the last of 8 bits at most, and float32 sums' error far below it
        torch.testing.assert_close(got.grad, exact.grad, rtol=2**-8, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(("backend", "count"), [("torch", 128), pytest.param("triton", 4, marks=INTERPRETED)])
def test_shares_of_a_bfloat16_gradient_are_added_before_they_are_rounded(
    backend: str, count: int, tmp_path: Path
) -> None:
    in_processes(half_precision, 2, tmp_path, backend, count)


def test_padding_never_counts_on_one_process_either() -> None:
    x = inputs(torch.float64)
    want, want_grads = run_linear(x, CONFIGS[3], backend="torch")
    got, grads = run_linear(cut(x, (13,), 0), CONFIGS[3], vocab_size=V)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(grads["weight"][:V], want_grads["weight"])
    assert not grads["weight"][V:].any()
    got, grads = run_logits(cut(x, (13,), 0), CONFIGS[3], vocab_size=V)
    torch.testing.assert_close(grads["logits"][..., :V], run_logits(x, CONFIGS[3], backend="torch")[1]["logits"])


def wrong_calls(rank: int, size: int, file: str, counts: tuple[int, ...]) -> None:
    with group_of(rank, size, file) as group:
        x = cut(inputs(torch.float32), counts, rank)
        with pytest.raises(RuntimeError, match="tp_group"):
            run_logits(x, LossConfig(), tp_group=group, backend="triton")
        with pytest.raises(ValueError, match=r"vocab_size: got 99 with 11 columns"):
            run_linear(x, LossConfig(), tp_group=group, vocab_size=99)
        with pytest.raises(ValueError, match=r"tokens: got id 10.*V = 9"):
            run_linear(x, LossConfig(), tp_group=group, vocab_size=9)
        whole = distribute_tensor(inputs(torch.float32)["weight"], init_device_mesh("cpu", (size,)), [Shard(0)])
        with pytest.raises(ValueError, match="tp_group: got a head that is a DTensor over it"):
            linear_logps(x["hidden"], whole, TOKENS, tp_group=group)


def test_wrong_calls_say_what_is_wrong_before_any_work(tmp_path: Path) -> None:
    in_processes(wrong_calls, 2, tmp_path, (6, 5))
    x = inputs(torch.float32)
    for value in (0, 12, 2.0, True):
        with pytest.raises(ValueError, match="vocab_size"):
            run_linear(x, LossConfig(), vocab_size=value)
    with pytest.raises(TypeError, match=r"tp_group: got world, expected a torch\.distributed process group"):
        run_linear(x, LossConfig(), tp_group="world")
