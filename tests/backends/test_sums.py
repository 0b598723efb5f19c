"""A head's gradient whose first product is written into memory that holds anything, and is neither filled nor read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefixloss import LossConfig, linear_logps, linear_prefix_loss
from prefixloss.backends import memory
from prefixloss.backends.sums import Sum

N, D, V = 21, 16, 50


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody filled holds NaN, torch's own too."""
    made = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *given: made(*given).fill_(torch.nan))
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(64 * N + 16 * 4 * V))  # two chunks
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(backend: str, dtype: torch.dtype, scored: Tensor, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((N, D), (V, D), (V,))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    tokens = torch.randint(V, (N,), generator=generator)
    options: dict[str, Any] = {"lm_head_bias": leaves[2], "mask": scored, "backend": backend}
    if kind == "logps":
        linear_logps(*leaves[:2], tokens, **options).logps.sum().backward()
    else:
        config = LossConfig(gradient_tolerance=1e-3, head_gradient_tolerance=1e-3) if kind == "tolerant" else None
        advantages = torch.randn(N, generator=generator)
        loss = linear_prefix_loss(*leaves[:2], tokens, advantages, config=config or LossConfig(), **options).loss
        loss.backward()
    return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


# single entries by the kernels' interpreter take long
KINDS = [("torch", "loss"), ("torch", "logps"), ("torch", "tolerant"), ("triton", "loss"), ("triton", "logps"),
         pytest.param("triton", "tolerant", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "kind"), KINDS)
def test_what_the_memory_held_is_in_no_gradient(backend: str, dtype: torch.dtype, kind: str) -> None:
    scored = torch.ones(N, dtype=torch.bool)
    # the last rounding, and the tolerance beside the largest
    bound = torch.finfo(dtype).eps + (4e-3 if kind == "tolerant" else 1e-5)
    want = gradients("reference", dtype, scored, "logps" if kind == "logps" else "loss")
    for got, exact in zip(gradients(backend, dtype, scored, kind), want, strict=True):
        assert (got - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("kind", ["loss", "logps"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_a_token_it_is_0(backend: str, kind: str) -> None:
    made = gradients(backend, torch.float32, torch.zeros(N, dtype=torch.bool), kind)
    assert len(made) == 3
    assert not any(gradient.any() for gradient in made)


class Fills(TorchDispatchMode):
    """Which operations fill a tensor as large as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("zero_", "zeros", "new_zeros", "fill_") and out.numel() == V * D:
            self.found.append(str(func))
        return out


def test_a_sum_is_filled_only_where_nothing_is_added_or_entries_are(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(V, 8), torch.randn(8, D)
    monkeypatch.setattr(memory, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype).mul_(torch.nan))
    with Fills() as fills:
        total = Sum((V, D), torch.float32, torch.device("cpu"))
        total.add_product(a, b, 2.0)
        total.add_head_gradient(a.t(), b)
        torch.testing.assert_close(total.value, 3 * a @ b)
        first = Sum((V, D), torch.float32, torch.device("cpu"))
        first.add_head_gradient(a.t(), b)
        torch.testing.assert_close(first.value, a @ b)
    assert fills.found == []
    with fills:
        assert not Sum((V, D), torch.float32, torch.device("cpu")).value.any()
    assert fills.found == ["aten.zero_.default"]
