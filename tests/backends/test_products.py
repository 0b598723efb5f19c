"""The head's products where a library offers less than others, and where somebody has replaced torch's own."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixloss.backends import products

# n rows, hidden size, vocabulary: none a multiple of another, nor of a tile
N, D, V = 6, 9, 50
CPU = torch.device("cpu")
MM, ADDMM = torch.mm, torch.addmm


class Library:
    """A vendor's library on the CPU: half-precision products with float32 results, as far as `takes` says."""

    def __init__(self, takes: set[str]) -> None:
        self.takes = takes
        self.made: list[tuple[str, torch.Size]] = []

    def mm(self, a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None) -> Tensor:
        if out_dtype is None:
            return MM(a, b) if out is None else MM(a, b, out=out)
        return self._made("mm", a, b, out, 0.0)

    def addmm(self, total: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any, out: Tensor) -> Tensor:
        return self._made("addmm", a, b, out, total.double())

    def _made(self, name: str, a: Tensor, b: Tensor, out: Tensor, before: Any) -> Tensor:
        if name not in self.takes:
            raise RuntimeError(f"{name}: no such product\nand the rest of a long message")
        self.made.append((name, out.shape))
        return out.copy_(before + MM(a.double(), b.double()))


@pytest.fixture(params=[("mm", "addmm"), ("mm",), ()], ids=["both", "mm alone", "neither"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """Stands in for torch.mm and torch.addmm; the CPU is asked as a GPU would be."""
    made = Library(set(request.param))
    monkeypatch.setattr(torch, "mm", made.mm)
    monkeypatch.setattr(torch, "addmm", made.addmm)
    for name, product in (("_has_float32_result", "mm"), ("_has_float32_sum", "addmm")):
        monkeypatch.setattr(
            products, name, lambda device, dtype, product=product: products._takes(product, device, dtype, False)
        )
    products._takes.cache_clear()
    yield made
    products._takes.cache_clear()


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], bias [V] and logit gradients [N, V]."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((N, D), (V, D), (V,), (N, V))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return made[0], made[1], made[2], made[3]


def run_all(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Each of the three products, twice into the sum, and what it is in float64."""
    hidden, weight, bias, grads = operands(dtype)
    grads = grads.to(products.gradient_dtype(hidden, weight))
    logits, total = torch.empty(N, V), torch.zeros(V, D)
    products.logits(hidden, weight, bias, logits)
    for _ in range(2):
        products.add_head_gradient(total, grads, hidden)
    h, w, b, g = (x.double() for x in (hidden, weight, bias, grads))
    return [
        (logits, h @ w.t() + b),
        (products.hidden_gradient(grads, weight), g @ w),
        (total, 2 * g.t() @ h),
    ]


def test_the_first_product_of_a_sum_is_not_added_to_what_was_there(library: Library) -> None:
    hidden, _, _, grads = operands(torch.bfloat16)
    total = torch.full((V, D), torch.nan)
    products.add_head_gradient(total, grads, hidden, first=True)
    want = grads.double().t() @ hidden.double()
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=N * 20 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_way_gives_float32_sums(library: Library, dtype: torch.dtype) -> None:
    for got, want in run_all(dtype):
        assert got.dtype == torch.float32
        # half-precision inputs are exact: up to V products of numbers below 20 in float32, each rounded once
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=V * 20 * 2.0**-24)


def test_the_fast_products_are_taken_where_they_are_offered_and_no_other(library: Library) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        products._has_float32_result(CPU, dtype)
        products._has_float32_sum(CPU, dtype)
    library.made.clear()
    run_all(torch.bfloat16)
    ways = {
        ("mm", "addmm"): ["mm", "addmm", "addmm", "mm"],
        ("mm",): ["mm", "mm", "mm", "mm"],  # a slice of the head's gradient each, added by itself
        (): [],  # in float32
    }
    assert sorted(name for name, _ in library.made) == sorted(ways[tuple(sorted(library.takes, reverse=True))])


def test_what_is_refused_is_said_once(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "prefixloss"):
        run_all(torch.bfloat16)
        run_all(torch.bfloat16)
    # without the plain product nobody asks for the sum
    refused = {2: [], 1: ["torch.addmm"], 0: ["torch.mm"]}[len(library.takes)]
    assert [message.split()[0] for message in caplog.messages] == refused
    for message in caplog.messages:
        assert "of torch.bfloat16 into float32 is refused on cpu by torch " in message
        assert "no such product): " in message


@pytest.mark.parametrize("library", [("mm",)], indirect=True)
def test_a_product_on_its_way_into_the_sum_takes_bounded_memory(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_UPCAST", 8 * D)
    (_, _), (_, _), (total, want) = run_all(torch.bfloat16)
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=N * 20 * 2.0**-24)
    slices = [shape for _, shape in library.made if shape[1] == D and shape[0] != N and shape[0] <= 8]
    assert len(slices) == 2 * 7  # 50 rows in slices of 8, twice
    assert not any(shape == (V, D) for _, shape in library.made)


@pytest.mark.parametrize("library", [()], indirect=True)
def test_a_full_memory_is_not_taken_for_an_answer(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "mm", full)
    with pytest.raises(torch.OutOfMemoryError):
        products._has_float32_result(CPU, torch.bfloat16)
    library.takes.add("mm")
    monkeypatch.setattr(torch, "mm", library.mm)
    assert products._has_float32_result(CPU, torch.bfloat16)


def test_a_device_is_asked_again_once_tunable_op_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(products, "_takes", lambda *key: bool(asked.append(key)))
    for on in (False, True):
        monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda on=on: on)
        products._has_float32_result(torch.device("cuda:1"), torch.bfloat16)
        products._has_float32_sum(torch.device("cuda:1"), torch.bfloat16)
    assert len(set(asked)) == 4
    products._has_float32_result(torch.device("xpu:0"), torch.bfloat16)  # which has no TunableOp
    assert asked[-1][-1] is False


# a program of its own: what it registers holds for the whole process
REPLACED = """
import json, os, sys, warnings
os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from prefixloss import linear_logps, linear_prefix_loss

warnings.simplefilter("ignore")  # torch's, that a kernel is replaced

class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "linear", "matmul"):
            self.seen[str(func)] = self.seen.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))

dtypes = []
def own(a, b):
    # as those of vLLM and Megatron: the result has the inputs' dtype, and none is for float64
    dtypes.append({torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[a.dtype])
    return (a[:, :, None] * b[None]).sum(1)

def run(backend, dtype):
    torch.manual_seed(1)
    shapes = (5, 33), (70, 33), (70,)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64).to(getattr(torch, dtype)) for s in shapes)
    tokens, advantages = torch.arange(5), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    def call():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_prefix_loss(*leaves[:2], tokens, advantages, lm_head_bias=leaves[2], backend=backend).loss
        logps = linear_logps(*leaves[:2], tokens, lm_head_bias=leaves[2], backend=backend).logps
        return torch.autograd.grad(loss + (logps * advantages).sum(), leaves)
    want = call()
    dtypes.clear()
    library = torch.library.Library("aten", "IMPL")
    library.impl("aten::mm", own, "CPU")
    with Products() as products:
        got = call()
    calls = len(dtypes)
    library._destroy()
    call()
    error = max(((g - w).double().norm() / w.double().norm()).item() for g, w in zip(got, want))
    return dict(calls=calls, later=len(dtypes) - calls, dtypes=sorted(set(dtypes)), seen=products.seen, error=error)

print(json.dumps({case: run(*case.split()) for case in sys.argv[1:]}))
"""
CASES = ("torch float32", "torch bfloat16", "triton bfloat16", "torch float64")


@pytest.fixture(scope="module")
def replaced() -> tuple[dict[str, Any], str]:
    """What `REPLACED` prints, and what it says."""
    command = [sys.executable, "-c", REPLACED, *CASES]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("case", "calls", "error"),
    # The loss: logits, and gradients of hidden states and head (and, with kernels, of the bias). The log-probs: as many
    # and the logits again. Float32 sums in another order; what is returned in bfloat16 is rounded once more, 2^-9.
    [("torch float32", 7, 1e-6), ("torch bfloat16", 7, 4e-3), ("triton bfloat16", 9, 4e-3)],
)
def test_a_product_that_somebody_put_in_place_of_torchs_is_the_one_that_is_called(
    replaced: tuple[dict[str, Any], str], case: str, calls: int, error: float
) -> None:
    made = replaced[0][case]
    assert made["calls"] == calls
    if case.startswith("torch"):  # what happens inside an operator no mode sees
        assert made["seen"] == {"aten.mm.default": calls}  # none goes past it
    assert made["dtypes"] == ["float32"]  # what it returns is not rounded to half precision
    assert made["later"] == 0  # once it is taken away again
    assert made["error"] < error
    assert replaced[1].count("aten::mm is replaced on cpu") == 1


def test_float64_has_torchs_own_product_whoever_replaced_the_others(replaced: tuple[dict[str, Any], str]) -> None:
    made = replaced[0]["torch float64"]
    assert made["calls"] == 0
    assert made["error"] == 0
