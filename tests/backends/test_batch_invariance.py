"""With `chunk_tokens`, a token has the same bits alone, in any batch, at any place in it and under any mask.

Its log-prob, entropy, KL and gradient, that is; the head's gradient is a sum over tokens, and has no such thing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.maths import objectives
from prefixloss.maths.objective import Given, Terms, token_terms

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# tokens, among them one without advantage and one whose ratio is clipped: more than the 8 numbers of a vector
# instruction, and not a multiple
N = 11

# kernels: interpreted where there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Results = tuple[Tensor, ...]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch shares sums and products out to threads, which must not show."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Batch:
    """N tokens. What `run` returns for some of them: log-probs, entropies, KL and gradient, one row a token."""

    def __init__(self, dtype: torch.dtype, width: int, vocabulary: int, banned: bool = False) -> None:
        generator = torch.Generator().manual_seed(width)
        self.floats = F64 if dtype == F64 else F32

        def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64).to(to)

        self.hidden, self.ref_hidden = random(N, width), random(N, width)
        self.weight, self.ref_weight, self.bias = (
            random(vocabulary, width),
            random(vocabulary, width),
            random(vocabulary),
        )
        self.logits, self.ref_logits = random(N, vocabulary), random(N, vocabulary)
        self.tokens = torch.randint(vocabulary, (N,), generator=generator)
        self.advantages = random(N, to=self.floats)
        self.advantages[2] = 0
        self.old, self.sampler, self.ref = (-random(N, to=self.floats).abs() * 4 for _ in range(3))
        self.advantages[3], self.old[3] = 1.0, -40.0  # clipped
        if banned:
            self.logits[1, (int(self.tokens[1]) + 1) % vocabulary] = -torch.inf

    def _given(self, index: Tensor, config: LossConfig) -> dict[str, Any]:
        given = {"old_logps": self.old[index], "config": config, "normalizer": 5.0}
        if config.sampler_correction is not None:
            given["sampler_logps"] = self.sampler[index]
        if config.kl in ("k2", "k3"):
            given["ref_logps"] = self.ref[index]
        return given

    def linear(self, index: Tensor, mask: Tensor | None, backend: str, config: LossConfig, frozen: bool) -> Results:
        hidden = self.hidden[index].requires_grad_()
        weight, bias = (x.clone().requires_grad_(not frozen) for x in (self.weight, self.bias))
        given = self._given(index, config)
        if config.kl == "full":
            given |= {"ref_hidden": self.ref_hidden[index], "ref_lm_head_weight": self.ref_weight}
        out = linear_prefix_loss(
            hidden, weight, self.tokens[index], self.advantages[index], lm_head_bias=bias, mask=mask, backend=backend,
            **given,
        )  # fmt: skip
        out.loss.sum().backward()
        return out.logps, out.entropy, out.kl, _made(hidden)

    def from_logits(self, index: Tensor, mask: Tensor | None, backend: str, config: LossConfig, _: bool) -> Results:
        logits = self.logits[index].requires_grad_()
        given = self._given(index, config)
        if config.kl == "full":
            given["ref_logits"] = self.ref_logits[index]
        out = prefix_loss(logits, self.tokens[index], self.advantages[index], mask=mask, backend=backend, **given)
        out.loss.sum().backward()
        return out.logps, out.entropy, out.kl, _made(logits)

    def log_probs(self, index: Tensor, mask: Tensor | None, backend: str, config: LossConfig, frozen: bool) -> Results:
        hidden, weight = self.hidden[index].requires_grad_(), self.weight.clone().requires_grad_(not frozen)
        logps, entropy = linear_logps(
            hidden, weight, self.tokens[index], mask=mask, softcap=config.softcap, backend=backend,
            entropy=config.entropy_coef != 0, chunk_tokens=config.chunk_tokens,
        )  # fmt: skip
        wanted = logps if entropy is None else logps + 0.3 * entropy
        (wanted * self.advantages[index]).sum().backward()
        return (
            logps.detach(),
            torch.zeros(len(index), device=index.device) if entropy is None else entropy.detach(),
            _made(hidden),
        )


def _made(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def same_bits(run: Callable[[Tensor, Tensor | None], Results], device: str = "cpu") -> None:
    """Tokens alone, in the opposite order, and under a mask, against all of them together."""
    everyone = torch.arange(N, device=device)
    together = run(everyone, None)
    assert together[-1].abs().sum() > 0
    order = everyone.flip(0)
    mask = torch.arange(N, device=device) % 3 != 1
    cases = [(order, None, order, slice(None)), (everyone, mask, everyone[mask], mask)]
    cases += [(everyone[i : i + 1], None, everyone[i : i + 1], slice(None)) for i in (0, 3, N - 1)]
    for index, given, tokens, rows in cases:
        for got, want in zip(run(index, given), together, strict=True):
            assert torch.equal(got[rows], want[tokens]), (index, given)


TORCH = [
    # widths and vocabularies with every remainder of a tile, and one that threads share; chunks of 1 token to more
    # than there are; frozen heads, whose forward makes the gradient
    ("linear", F32, 7, 11, {"chunk_tokens": 3}, False),
    ("linear", F64, 33, 257, {"chunk_tokens": 5}, False),
    ("linear", F32, 33, 257, {"chunk_tokens": 1, "objective": "sapo", "entropy_coef": 0.1}, False),
    ("linear", F64, 100, 1000, {"chunk_tokens": 20, "objective": "sapo", "kl": "full", "kl_coef": 0.1}, False),
    ("linear", BF16, 65, 301, {"chunk_tokens": 4, "kl": "k3", "kl_coef": 0.1, "stats": "scored"}, False),
    ("linear", F16, 16, 40_001, {"chunk_tokens": 4, "objective": "cispo", "clip_high": 4.0}, False),
    ("linear", F32, 33, 130, {"chunk_tokens": 2, "reduction": "none", "softcap": 5.0, "temperature": 0.7}, False),
    ("linear", F32, 33, 130, {"chunk_tokens": 2, "reduction": "none", "sampler_correction": "tis"}, True),
    ("linear", F64, 9, 40_001, {"chunk_tokens": 4, "kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}, False),
    ("log_probs", F32, 33, 257, {"chunk_tokens": 5}, False),
    ("log_probs", F64, 33, 257, {"chunk_tokens": 4, "entropy_coef": 0.1}, False),
    ("log_probs", BF16, 17, 301, {"chunk_tokens": 3, "softcap": 5.0}, True),
    ("from_logits", F32, 1, 11, {"chunk_tokens": 3, "objective": "sapo"}, False),
    ("from_logits", F64, 1, 1000, {"chunk_tokens": 2, "kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}, False),
    ("from_logits", F16, 1, 301, {"chunk_tokens": 2, "softcap": 5.0, "entropy_coef": 0.1}, False),
    ("from_logits", F32, 1, 40_001, {"chunk_tokens": 7, "entropy_coef": 0.1}, False),
]


@pytest.mark.parametrize(("way", "dtype", "width", "vocabulary", "options", "frozen"), TORCH)
def test_torch_gives_a_token_the_same_bits_in_any_batch(
    threads: int, way: str, dtype: torch.dtype, width: int, vocabulary: int, options: dict[str, Any], frozen: bool
) -> None:
    batch = Batch(dtype, width, vocabulary)
    call = getattr(batch, way)
    same_bits(lambda index, mask: call(index, mask, "torch", LossConfig(**options), frozen))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "objective", [name for name, made in objectives.BY_NAME.items() if not (made.by_response or made.by_batch)]
)
def test_a_tokens_loss_and_derivatives_have_the_same_bits_wherever_it_stands(
    objective: str, dtype: torch.dtype
) -> None:
    # the last numbers of a tensor, those beyond whole vectors of 8 to 32, go through other code in some of torch's
    # functions: every token stands among the last once
    cap = {"clip_high": 4.0} if objective == "cispo" else {}
    count, config = 37, LossConfig(objective=objective, kl="k3", kl_coef=0.1, sampler_correction="tis", **cap)
    generator = torch.Generator().manual_seed(2)
    columns = torch.randn(6, count, generator=generator, dtype=dtype)

    def terms(rows: slice) -> Terms:
        a, logp, old, sampler, ref, entropy = (x.clone() for x in columns[:, rows])
        return token_terms(config, Given(a, logp + old, logp + sampler, logp + ref), logp, entropy, None)

    together = terms(slice(None))
    for token in range(count):
        for name in ("loss", "d_logp", "ratio", "kl"):
            alone = getattr(terms(slice(token, token + 1)), name)
            assert torch.equal(alone, getattr(together, name)[token : token + 1]), (token, name)


def test_a_banned_token_in_one_row_leaves_the_others_entropies_alone() -> None:
    batch = Batch(F32, 1, 1000, banned=True)
    config = LossConfig(chunk_tokens=N, entropy_coef=0.1)
    same_bits(lambda index, mask: batch.from_logits(index, mask, "torch", config, False))


TRITON = [
    ("linear", F32, 7, 11, {"chunk_tokens": 3, "objective": "sapo"}, False),
    ("linear", F32, 33, 257, {"chunk_tokens": 3, "kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}, False),
    ("linear", F16, 33, 130, {"chunk_tokens": 4, "softcap": 5.0}, False),
    ("linear", BF16, 17, 130, {"chunk_tokens": 2, "reduction": "none"}, True),
    ("log_probs", BF16, 33, 130, {"chunk_tokens": 20, "entropy_coef": 0.1}, False),
    ("from_logits", F32, 1, 257, {"chunk_tokens": 3, "kl": "k3", "kl_coef": 0.1}, False),
    # several programs share a row, as many whatever the batch
    ("linear", F32, 5, 5000, {"chunk_tokens": 2}, False),
    ("from_logits", F32, 1, 5000, {"chunk_tokens": 2}, False),
    ("from_logits", BF16, 1, 5000, {"chunk_tokens": 3, "reduction": "none"}, False),
]


@pytest.mark.parametrize(("way", "dtype", "width", "vocabulary", "options", "frozen"), TRITON)
def test_kernels_give_a_token_the_same_bits_in_any_batch(
    way: str, dtype: torch.dtype, width: int, vocabulary: int, options: dict[str, Any], frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from prefixloss._kernels import launch  # noqa: PLC0415

    # a small device: one token's row is split, eleven tokens' rows are not
    monkeypatch.setattr(launch, "processors", lambda device: 3)
    batch = Batch(dtype, width, vocabulary)
    for name, value in vars(batch).items():
        setattr(batch, name, value.to(DEVICE) if isinstance(value, Tensor) else value)
    call = getattr(batch, way)
    same_bits(lambda index, mask: call(index, mask, "triton", LossConfig(**options), frozen), DEVICE)


def test_as_many_programs_share_a_row_of_logits_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixloss._kernels import launch  # noqa: PLC0415

    splits: list[int] = []
    chosen = launch.splits_for
    monkeypatch.setattr(launch, "processors", lambda device: 3)
    monkeypatch.setattr(launch, "splits_for", lambda *given: splits.append(chosen(*given)) or splits[-1])
    batch = Batch(F32, 1, 5000)
    for name, value in vars(batch).items():
        setattr(batch, name, value.to(DEVICE) if isinstance(value, Tensor) else value)
    for options, wanted in (({"chunk_tokens": 2}, {2}), ({}, {1, 4})):
        for more in ({}, {"reduction": "none"}):  # one launch, and statistics and gradient apart
            splits.clear()
            for count in (1, N):
                batch.from_logits(
                    torch.arange(count, device=DEVICE), None, "triton", LossConfig(**options, **more), False
                )
            assert set(splits) == wanted
            assert len(splits) == (4 if more else 2)


@pytest.mark.parametrize("tokens", [1, 20, 41])
def test_every_product_of_the_kernels_back_end_has_the_same_number_of_rows(tokens: int) -> None:
    from prefixloss.backends.problem import Head  # noqa: PLC0415
    from prefixloss.backends.triton.chunks import HeadChunks, Wanted  # noqa: PLC0415

    head = Head(torch.ones(50, 9, device=DEVICE), torch.ones(30, 9, device=DEVICE), None)
    chunks = HeadChunks(head, None, Wanted(torch.arange(tokens, device=DEVICE), None), 20)
    assert (chunks.step, chunks.size) == (20, 32)
    assert [len(chunk.rows) for chunk in chunks] == [20] * (tokens // 20) + [tokens % 20] * (tokens % 20 > 0)
    (room,) = chunks.rooms
    assert room.hidden.stride(0) == room.logits.stride(0) // 2 == 16  # rows start at whole cache lines
