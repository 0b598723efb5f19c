"""backend="torch" as operators: what `torch.library` and `torch.compile` ask, and the same results as without."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from prefixloss import LossConfig, TokenAdvantages, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends.torch import operators as torch_operators

B, T, D, V = 2, 5, 8, 37
N = B * T


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, seed=seed).to(dtype).requires_grad_()


IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
OLD = random(B, T, seed=6, scale=0.1) - math.log(V)
PAIR = TokenAdvantages(torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.0]), torch.tensor([2, 3]))
ADVANTAGES = random(B, T, seed=7)
REFERENCE = {"ref_hidden": random(B, T, 3, seed=8), "ref_lm_head_weight": random(V, 3, seed=9)}
GIVEN: dict[str, Any] = {"mask": MASK, "old_logps": OLD, "backend": "torch"}

# ---- the operators themselves


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments."""
    nothing, three = (None, None, None), [True, True, True]
    head = (leaf(N, D), leaf(V, D, seed=2), leaf(V, seed=3))
    reference = (random(N, 3, seed=8), random(V, 3, seed=9), None)
    logits, alone = (leaf(N, V, seed=4), None, None), [True, False, False]
    ids, wanted = IDS.flatten(), MASK.flatten()
    options = LossConfig(entropy_coef=0.1, kl="k3", kl_coef=0.2, stats="scored").encoded
    exact = LossConfig(kl="full", kl_coef=0.2, entropy_coef=0.1, temperature=1.5, softcap=3.0).encoded
    recorded = (random(N, seed=5), OLD.flatten(), None, OLD.flatten() + 0.1)
    rest = (ids, wanted, wanted, *recorded, wanted / 7.0, torch.tensor(1.0))
    stats = torch_operators.token_statistics(*(x.detach() for x in head), *reference, ids, wanted, exact, three)
    incoming = random(6, N, seed=7) * wanted
    return {
        "fused_loss": (torch_operators.fused_loss, (*head, *nothing, *rest, options, three)),
        "fused_loss, logits": (torch_operators.fused_loss, (*logits, *nothing, *rest, options, alone)),
        "fused_loss, exact KL": (torch_operators.fused_loss, (*head, *reference, *rest, exact, three)),
        "token_statistics": (torch_operators.token_statistics, (*head, *reference, ids, wanted, exact, three)),
        "token_statistics, logits": (
            torch_operators.token_statistics, (*logits, *nothing, ids, wanted, options, alone)
        ),
        "token_gradient": (
            torch_operators.token_gradient,
            (*(x.detach() for x in head), *reference, ids, wanted, stats, incoming, exact, three),
        ),
    }  # fmt: skip


NAMES = (
    "fused_loss", "fused_loss, logits", "fused_loss, exact KL", "token_statistics", "token_statistics, logits",
    "token_gradient",
)  # fmt: skip


def test_every_operator_is_called() -> None:
    registered = {x._name for x in vars(torch_operators).values() if isinstance(x, CustomOpDef)}
    assert {operator._name for operator, _ in calls().values()} == registered
    assert set(NAMES) == set(calls())


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_they_say(name: str) -> None:
    """Schema, fake implementation, autograd registration, and the same under compilation."""
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


# ---- whole calls, compiled


def fused(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = LossConfig(entropy_coef=0.01, temperature=0.7)
    return linear_prefix_loss(hidden, weight, IDS, ADVANTAGES, lm_head_bias=bias, config=config, **GIVEN).loss


def sequence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = LossConfig(reduction="seq-mean-token-mean", kl="k3", kl_coef=0.1, ratio_level="sequence")
    out = linear_prefix_loss(hidden, weight, IDS, PAIR, ref_logps=OLD + 0.1, config=config, **GIVEN)
    return out.loss + 0 * out.metrics["entropy"]


def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = LossConfig(kl="full", kl_coef=0.3, stats="scored")
    out = linear_prefix_loss(hidden, weight, IDS, PAIR, config=config, lm_head_bias=bias, **REFERENCE, **GIVEN)
    return out.loss + 0 * out.metrics["kl"]


def per_token(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    config = LossConfig(reduction="none", row_tolerance=1e-3)
    return linear_prefix_loss(hidden, weight, IDS, PAIR, config=config, **GIVEN).loss.square().sum()


def from_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return prefix_loss(hidden @ weight.t(), IDS, PAIR, inplace=True, **GIVEN).loss


def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = linear_logps(hidden, weight, IDS, mask=MASK, lm_head_bias=bias, entropy=True, softcap=4.0, backend="torch")
    assert out.entropy is not None
    return (out.logps * out.entropy).sum()


def frozen_head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_logps(hidden, weight.detach(), IDS, mask=MASK, backend="torch").logps.square().sum()


def nothing_learns(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_prefix_loss(hidden, weight, IDS, torch.zeros(B), **GIVEN).loss


FUNCTIONS = [fused, sequence, exact, per_token, from_logits, log_probs, frozen_head, nothing_learns]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_compiled_call_has_no_graph_break_and_the_same_gradient(function: Callable[..., Tensor]) -> None:
    results = []
    torch._dynamo.reset()
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = leaf(B, T, D), leaf(V, D, seed=2), leaf(V, seed=3)
        loss = call(*leaves)
        (1.3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
    assert len(results[0]) > 1
    # the same products of at most V numbers; a frozen head's in another order
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", [fused, from_logits, log_probs])
def test_in_every_dtype(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    results = []
    torch._dynamo.reset()
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = leaf(B, T, D, dtype=dtype), leaf(V, D, seed=2, dtype=dtype), leaf(V, seed=3, dtype=dtype)
        loss = call(*leaves)
        loss.backward()
        learnt = [x.grad for x in leaves if x.grad is not None]
        assert all(g.dtype == dtype for g in learnt)
        results.append([loss.detach(), *learnt])
    # the same operations, but that of two stages for logits in place: a few roundings to the dtype
    eps = 8 * torch.finfo(dtype).eps
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=eps, atol=eps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("advantages", ["token", "pair"])
def test_other_sizes_take_the_same_graph(advantages: str, backend: str) -> None:
    """Compiled once for any number of responses and tokens, with any number of them learning."""
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Any, mask: Tensor) -> Tensor:
        return linear_prefix_loss(hidden, weight, ids, advantages, mask=mask, backend=backend).loss

    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for b, t, share in ((2, 5, 0.5), (3, 7, 1.0), (4, 9, 0.0)):
        g = torch.Generator().manual_seed(b)
        pair = TokenAdvantages(random(b, seed=b), random(b, seed=t), torch.arange(b))
        credit: Any = pair if advantages == "pair" else random(b, t, seed=t)
        mask = torch.rand(b, t, generator=g) < share
        given = random(b, t, D, seed=b), random(V, D, seed=2), torch.randint(V, (b, t), generator=g), credit, mask
        assert torch.equal(compiled(*given), loss(*given))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inductor_takes_them_too(function: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        leaves = leaf(B, T, D), leaf(V, D, seed=2), leaf(V, seed=3)
        loss = call(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
