"""What is timed, on random data: ours, the floors, PyTorch and its own fused head, TRL, Liger and Cut Cross-Entropy.

All compute the same loss: clipped at 0.2, perhaps with a k3 penalty, averaged over tokens. A call comes in two halves,
forward and backward; every wrapper of a peer is here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import memory, products

BF16 = torch.bfloat16
IGNORED = -100
TRL_TILE = 32_768  # columns at a time, TRL's own choice
# tokens at a time for those that ask: more than Liger's own single response or PyTorch's own 4 rows (D 128, V 32,768),
# with which they take several times as long
AT_ONCE = 1024


class Result(NamedTuple):
    """loss: 0-d and attached to its graph; logps: [N], detached. None where a method does not give it."""

    loss: Tensor | None = None
    logps: Tensor | None = None


def of_loss(result: Result) -> None:
    assert result.loss is not None
    result.loss.backward()


@dataclass(frozen=True)
class Step:
    """A call. leaves: what gets a gradient. renew: before each call, for one that overwrites its input."""

    forward: Callable[[], Result]
    leaves: tuple[Tensor, ...] = ()
    backward: Callable[[Result], None] = of_loss
    renew: Callable[[], None] = lambda: None

    def __call__(self) -> Tensor | None:
        result = self.forward()
        self.backward(result)
        return None if result.loss is None else result.loss.detach()

    def start_again(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.renew()


@dataclass(frozen=True)
class Linear:
    """Hidden states [N, D] and a head [V, D], leaves; per token [N] ids, advantages, log-probs when sampled and of a
    reference. lengths, response_advantages: per response [B]; the latter None where a token has its own."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    lengths: Tensor
    response_advantages: Tensor | None
    kl_coef: float = 0.0
    softcap: float | None = None

    @classmethod
    def of(
        cls, weight: Tensor, lengths: Tensor, advantages: Tensor, response_advantages: Tensor | None = None, *,
        kl_coef: float = 0.0, softcap: float | None = None, seed: int = 0,
    ) -> Linear:  # fmt: skip
        """Tokens of which the policy is more or less sure, log-probs from about -7 to -1e-4, as those it sampled.

        Hidden states are noise and a multiple of the token's row of the head.
        """
        device, (vocabulary, width), count = weight.device, weight.shape, len(advantages)
        generator = torch.Generator(device).manual_seed(seed + 1)
        ids = torch.randint(vocabulary, (count,), generator=generator, device=device)
        hidden = torch.randn(count, width, generator=generator, device=device, dtype=weight.dtype)
        sure = 5 + 15 * torch.rand(count, 1, generator=generator, device=device)
        hidden += (sure * weight.detach()[ids].float()).to(weight.dtype)
        old = 0.1 * torch.randn(count, generator=generator, device=device) + expected_logps(hidden, weight, ids)
        ref = old + 0.1 * torch.randn(count, generator=generator, device=device)
        by_response = None if response_advantages is None else response_advantages.to(device)
        return cls(
            hidden.requires_grad_(), weight.requires_grad_(), ids, advantages.to(device), old, ref, lengths,
            by_response, kl_coef, softcap,
        )  # fmt: skip

    @classmethod
    def random(
        cls, device: torch.device, shape: tuple[int, int, int], responses: int, seed: int = 0, dtype: torch.dtype = BF16
    ) -> Linear:
        """shape: N, D, V. Responses of one length with one advantage each."""
        tokens, width, vocabulary = shape
        weight = random_head(device, width, vocabulary, dtype, seed)
        advantages = torch.randn(responses, generator=torch.Generator(device).manual_seed(seed), device=device)
        lengths = torch.full((responses,), tokens // responses)
        return cls.of(weight, lengths, advantages.repeat_interleave(tokens // responses), advantages, seed=seed)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    @property
    def learning(self) -> Tensor:
        """bool [N]."""
        return torch.ones_like(self.advantages, dtype=torch.bool) if self.kl_coef else self.advantages != 0

    @property
    def config(self) -> LossConfig:
        return LossConfig(kl="k3" if self.kl_coef else None, kl_coef=self.kl_coef, softcap=self.softcap)

    def loss(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """What a trainer writes around log-probs [n], of all tokens or of some."""
        terms = policy_terms(logps, self.old[rows], self.ref[rows], self.advantages[rows], self.kl_coef)
        return terms.sum() / len(self.tokens)


def random_head(device: torch.device, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[V, D], rows of norm about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype).div_(math.sqrt(width))


@torch.no_grad()
def expected_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """[N], near the policy's own without a product with the head: other tokens' logits are normal, |h|^2 / D wide."""
    own = torch.cat(
        [(h.float() * weight[i].float()).sum(-1) for h, i in zip(hidden.split(4096), ids.split(4096), strict=True)]
    )
    spread = torch.cat([h.float().square().mean(-1) for h in hidden.split(4096)])
    return -torch.nn.functional.softplus(math.log(len(weight) - 1) + spread / 2 - own)


def policy_terms(logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, kl_coef: float) -> Tensor:
    """Per token: the clipped objective, and kl_coef times k3 = exp(d) - d - 1 with d = ref - logp."""
    ratio = torch.exp(logps - old)
    terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if kl_coef:
        d = ref - logps
        terms = terms + kl_coef * (torch.exp(d) - d - 1)
    return terms


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


class Logits:
    """Logits [B, T, V], the leaf `leaf`, made anew from a copy before each call; ids and old log-probs [B, T]."""

    def __init__(
        self, device: torch.device, responses: int, length: int, vocabulary: int, *,
        dtype: torch.dtype = BF16, kl_coef: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        shape = (responses, length)
        self.given = torch.randn(*shape, vocabulary, generator=generator, device=device, dtype=dtype)
        self.tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
        sure = 5 + 15 * torch.rand(*shape, 1, generator=generator, device=device)
        self.given.scatter_add_(-1, self.tokens[..., None], sure.to(dtype))
        self.advantages = torch.randn(responses, generator=generator, device=device)
        rows, ids = self.given.flatten(0, 1), self.tokens.flatten()
        own = [token_logps(r.float(), i) for r, i in zip(rows.split(64), ids.split(64), strict=True)]
        self.old = (torch.cat(own) + 0.1 * torch.randn(len(ids), generator=generator, device=device)).view(shape)
        self.ref = self.old + 0.1 * torch.randn(shape, generator=generator, device=device)
        self.kl_coef = kl_coef
        self.leaf = self.given.clone().requires_grad_()

    @torch.no_grad()
    def renew(self) -> None:
        """In place, a call overwrites the logits."""
        self.leaf.copy_(self.given)

    @property
    def config(self) -> LossConfig:
        return LossConfig(kl="k3" if self.kl_coef else None, kl_coef=self.kl_coef)

    def loss(self, logps: Tensor) -> Tensor:
        return policy_terms(logps, self.old, self.ref, self.advantages[:, None], self.kl_coef).mean()


# Methods from hidden states


def ours(data: Linear, backend: str = "auto", advantages: Tensor | None = None, **options: Any) -> Step:
    given = data.advantages if advantages is None else advantages
    options = {"config": data.config, **options}

    def forward() -> Result:
        out = linear_prefix_loss(
            data.hidden, data.weight, data.tokens, given, old_logps=data.old, ref_logps=data.ref, backend=backend,
            **options,
        )  # fmt: skip
        return Result(out.loss, out.logps)

    return Step(forward, data.leaves)


def bare_products(data: Linear, count: int = 3) -> Step:
    """The floor: the learning tokens' logits, then the gradients of hidden states and head, a library call each, into
    memory that is ready."""
    learning = data.learning
    hidden, weight = data.hidden.detach(), data.weight.detach()
    if not learning.all():
        hidden = hidden[learning]
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> Result:
        torch.mm(hidden, weight.T, out=logits)
        return Result()

    def backward(_: Result) -> None:
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
        if count > 2:
            torch.mm(logits.T, hidden, out=d_weight)

    return Step(forward, (), backward)


def chunked_products(data: Linear) -> Step:
    """Our own products and nothing else: in chunks, with float32 results."""
    hidden, weight = data.hidden.detach(), data.weight.detach()
    rows, vocabulary = len(hidden), len(weight)
    size = memory.chunk_rows(rows, rows, 4 * vocabulary, hidden.device, None)
    logits = torch.empty(size, vocabulary, device=hidden.device)
    grads = torch.randn(size, vocabulary, device=hidden.device, dtype=hidden.dtype)

    def forward() -> Result:
        total = torch.zeros(weight.shape, device=hidden.device)
        for start in range(0, rows, size):
            here = hidden[start : start + size]
            products.logits(here, weight, None, logits[: len(here)])
            products.hidden_gradient(grads[: len(here)], weight)
            products.add_head_gradient(total, grads[: len(here)], here)
        return Result()

    return Step(forward, (), lambda _: None)


def around(data: Linear, logps_of: Callable[[], Tensor]) -> Step:
    """The loss as a trainer writes it, around somebody's log-probs [N]."""

    def forward() -> Result:
        logps = logps_of()
        return Result(data.loss(logps), logps.detach())

    return Step(forward, data.leaves)


def naive(data: Linear) -> Step:
    return around(data, lambda: token_logps(capped((data.hidden @ data.weight.T).float(), data.softcap), data.tokens))


def picked(data: Linear) -> Step:
    """PyTorch by somebody who knows which tokens learn: only their rows are multiplied."""
    rows = data.learning.nonzero().squeeze(1)

    def forward() -> Result:
        logits = capped((data.hidden[rows] @ data.weight.T).float(), data.softcap)
        logps = token_logps(logits, data.tokens[rows])
        return Result(data.loss(logps, rows), torch.zeros_like(data.old).index_copy(0, rows, logps.detach()))

    return Step(forward, data.leaves)


def compiled(data: Linear) -> Step:
    softcap, kl_coef = data.softcap, data.kl_coef

    @torch.compile(dynamic=False, fullgraph=True)
    def loss_of(
        hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        logps = token_logps(capped((hidden @ weight.T).float(), softcap), tokens)
        return policy_terms(logps, old, ref, advantages, kl_coef).mean(), logps

    def forward() -> Result:
        loss, logps = loss_of(data.hidden, data.weight, data.tokens, data.old, data.ref, data.advantages)
        return Result(loss, logps.detach())

    return Step(forward, data.leaves)


def torch_fused(data: Linear) -> Step:
    """PyTorch's own chunked head, with a log-prob a token."""
    from torch.nn import LinearCrossEntropyOptions  # noqa: PLC0415 (since 2.13)
    from torch.nn.functional import linear_cross_entropy  # noqa: PLC0415 (since 2.13)

    targets = torch.where(data.learning, data.tokens, IGNORED)
    options = LinearCrossEntropyOptions(batch_chunk_size=min(AT_ONCE, len(targets)))
    return around(
        data, lambda: -linear_cross_entropy(data.hidden, data.weight, targets, reduction="none", options=options)
    )


def trl_logps(data: Linear, weight: Tensor | None = None) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415 (an optional peer)

    head = data.weight if weight is None else weight
    return lambda: ChunkedLogProbFunction.apply(
        data.hidden, head, None, data.tokens, 1.0, TRL_TILE, data.softcap, 1.0, ()
    )[0]


def trl(data: Linear) -> Step:
    return around(data, trl_logps(data))


def cut_cross_entropy(data: Linear) -> Step:
    """Log-probs by its kernels on a GPU, by its torch.compile way elsewhere; it leaves out ignored tokens."""
    from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 (an optional peer)

    targets = torch.where(data.learning, data.tokens, IGNORED)
    way = "cce" if data.hidden.is_cuda else "torch_compile"
    return around(
        data,
        lambda: (
            -linear_cross_entropy(
                data.hidden, data.weight, targets, softcap=data.softcap, reduction="none", impl=way
            ).float()
        ),
    )


def liger(data: Linear, compiled: bool = True) -> Step:
    """Padded, as it wants its input; responses are put together up to `AT_ONCE` tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415 (an optional peer)

    assert data.response_advantages is not None
    index, mask = padding(data.lengths, data.hidden.device)
    tokens, old, ref = (x[index] for x in (data.tokens, data.old, data.ref))
    hidden = data.hidden.detach()[index].requires_grad_()
    loss = LigerFusedLinearGRPOLoss(
        beta=data.kl_coef, compiled=compiled, use_ref_model=bool(data.kl_coef),
        chunk_size=max(1, AT_ONCE // index.shape[1]),
    )  # fmt: skip

    def forward() -> Result:
        out = loss(
            hidden, data.weight, tokens, mask.float(), data.response_advantages, old_per_token_logps=old,
            ref_per_token_logps=ref if data.kl_coef else None,
        )  # fmt: skip
        return Result(out[0] if isinstance(out, tuple) else out)

    return Step(forward, (hidden, data.weight))


def padding(lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed tokens to rows of one length: int64 indices [B, T], 0 at padding; and which are tokens, bool [B, T]."""
    places = torch.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    return torch.where(mask, starts[:, None] + places, 0).to(device), mask.to(device)


def our_logps(data: Linear, backend: str, weight: Tensor | None = None) -> Callable[[], Tensor]:
    head = data.weight if weight is None else weight
    return lambda: linear_logps(data.hidden, head, data.tokens, backend=backend).logps


def with_gradient(logps: Callable[[], Tensor], gradient: Tensor, leaves: tuple[Tensor, ...]) -> Step:
    return Step(lambda: Result(logps=logps()), leaves, lambda result: _given(result.logps).backward(gradient))


def _given(logps: Tensor | None) -> Tensor:
    assert logps is not None
    return logps


def without_gradient(logps: Callable[[], Tensor]) -> Step:
    def forward() -> Result:
        with torch.no_grad():
            return Result(logps=logps())

    return Step(forward, (), lambda _: None)


# Methods from logits


def ours_from_logits(data: Logits, backend: str = "auto", inplace: bool = False) -> Step:
    def forward() -> Result:
        out = prefix_loss(
            data.leaf, data.tokens, data.advantages, old_logps=data.old, ref_logps=data.ref, inplace=inplace,
            backend=backend, config=data.config,
        )  # fmt: skip
        return Result(out.loss, out.logps)

    return Step(forward, (data.leaf,), renew=data.renew)


def ours_inplace(data: Logits) -> Step:
    return ours_from_logits(data, inplace=True)


def copy_logits(data: Logits) -> Step:
    """The floor: each logit is read once and its gradient written once."""
    target = torch.empty_like(data.given)

    def forward() -> Result:
        target.copy_(data.given)
        return Result()

    return Step(forward, (), lambda _: None)


def copy_logits_anew(data: Logits) -> Step:
    """The floor of a gradient in memory of its own: most of a large one's time goes into its first touch."""
    kept: list[Tensor] = []

    def forward() -> Result:
        kept.append(data.given.clone())
        return Result()

    return Step(forward, (), lambda _: None, renew=kept.clear)


def around_logits(data: Logits, logps_of: Callable[[], Tensor]) -> Step:
    def forward() -> Result:
        logps = logps_of()
        return Result(data.loss(logps), logps.detach())

    return Step(forward, (data.leaf,), renew=data.renew)


def naive_from_logits(data: Logits) -> Step:
    return around_logits(data, lambda: token_logps(data.leaf.float(), data.tokens))


def compiled_from_logits(data: Logits) -> Step:
    logps_of = torch.compile(lambda logits, tokens: token_logps(logits.float(), tokens), dynamic=False, fullgraph=True)
    return around_logits(data, lambda: logps_of(data.leaf, data.tokens))


def trl_from_logits(data: Logits) -> Step:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy  # noqa: PLC0415 (an optional peer)

    return around_logits(data, lambda: selective_log_softmax_and_entropy(data.leaf, data.tokens)[0])


def liger_from_logits(data: Logits, inplace: bool = False) -> Step:
    """Its logits are [B, T + 1, V], the last of which it leaves out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss  # noqa: PLC0415 (an optional peer)

    responses, length, vocabulary = data.given.shape
    leaf = data.given.new_zeros(responses, length + 1, vocabulary).requires_grad_()

    @torch.no_grad()
    def renew() -> None:
        leaf[:, :-1].copy_(data.given)

    def forward() -> Result:
        loss, _ = triton_grpo_loss(
            leaf, data.old, data.ref if data.kl_coef else None, data.tokens, data.advantages, temperature=1.0,
            beta=data.kl_coef, eps_low=0.2, eps_high=0.2, inplace=inplace, loss_type="dapo", reduce=True,
        )  # fmt: skip
        return Result(loss)

    return Step(forward, (leaf,), renew=renew)


def liger_inplace(data: Logits) -> Step:
    return liger_from_logits(data, inplace=True)


# What the harness knows of them


@dataclass(frozen=True)
class Method:
    """How to make a method's step from `Linear` or `Logits`, and what it needs.

    needs: what must be installed, and the module that shows it. gpu_only: why it runs on no CPU. by_token: whether
    it takes an advantage a token. skips: whether tokens that cannot learn are left out of its products. products: of
    N x D x V, in a call. whole: what it must hold at once of [N, V], bytes an entry. compiles: by torch.compile, at its
    first call.
    """

    label: str
    make: Callable[[Any], Step]
    needs: tuple[str, str] | None = None
    floor: bool = False
    gpu_only: str = ""
    by_token: bool = True
    softcap: bool = True
    skips: bool = False
    products: int = 3
    whole: float = 0.0
    compiles: bool = False


TORCH = ("torch >= 2.13", "torch.nn.modules.linear_cross_entropy")
TRL, LIGER, CCE = ("trl", "trl"), ("liger-kernel", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")
KERNELS = "its Triton kernels need a GPU"
OURS, FLOOR = "ours", "floor"
# by where the loss starts, then by name
METHODS: dict[str, dict[str, Method]] = {
    "hidden": {
        FLOOR: Method("bare products, learning tokens", bare_products, floor=True, skips=True, whole=2),
        OURS: Method("prefixloss", ours, skips=True),
        "naive": Method("PyTorch", naive, whole=8),
        "picked": Method("PyTorch, learning rows only", picked, skips=True, whole=8),
        "compiled": Method("PyTorch, compiled", compiled, whole=4, compiles=True),
        "torch": Method("torch linear_cross_entropy", torch_fused, needs=TORCH, softcap=False, products=4),
        "trl": Method("TRL chunked log-probs", trl, needs=TRL, products=4),
        "liger": Method(
            "Liger chunked GRPO", liger, needs=LIGER, by_token=False, softcap=False, products=4, compiles=True
        ),
        "cce": Method("Cut Cross-Entropy", cut_cross_entropy, needs=CCE, skips=True, compiles=True),
    },
    "logits": {
        FLOOR: Method("bare copy", copy_logits, floor=True, products=0, whole=2),
        "new-copy": Method("bare copy into new memory", copy_logits_anew, floor=True, products=0, whole=2),
        OURS: Method("prefixloss", ours_from_logits, products=0, whole=2),
        "ours-inplace": Method("prefixloss, in place", ours_inplace, products=0),
        "naive": Method("PyTorch", naive_from_logits, products=0, whole=6),
        "compiled": Method("PyTorch, compiled", compiled_from_logits, products=0, whole=2, compiles=True),
        "trl": Method("TRL selective_log_softmax", trl_from_logits, needs=TRL, gpu_only=KERNELS, products=0, whole=2),
        "liger": Method("Liger Triton GRPO", liger_from_logits, needs=LIGER, gpu_only=KERNELS, products=0, whole=2),
        "liger-inplace": Method(
            "Liger Triton GRPO, in place", liger_inplace, needs=LIGER, gpu_only=KERNELS, products=0
        ),
    },
}
NAMES = tuple(dict.fromkeys(name for methods in METHODS.values() for name in methods))
